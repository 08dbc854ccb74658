"""Draft models of another vocabulary: one rule and one sentence for every method that drafts."""

from __future__ import annotations

import pytest

import tokenthrift as tt
from decoding.draft_models import tokenizer
from tiny_models import generate, prompt, tiny
from tokenthrift.models.vocabularies import same_vocabulary

WORDS = [f"word{i}" for i in range(200)]
PLANS = {
    "speckv": lambda draft: tt.Plan(cache={"speckv": {"draft": draft, "budget": 12, "window": 4, "lookahead": 2}}),
    "specpc": lambda draft: tt.Plan(prefill={"specpc": {"model": draft, "budget": 12, "window": 4}}),
    "draft_model": lambda draft: tt.Plan(decode={"draft_model": {"model": draft, "adaptive": False}}),
}


def sized(words):
    return tiny("llama", vocab_size=words, eos_token_id=None, pad_token_id=0)


@pytest.fixture
def saved(tmp_path):
    """A model in a folder, with a tokenizer of these words."""

    def save(model, words, name):
        model.save_pretrained(tmp_path / name)
        tokenizer(words).save_pretrained(tmp_path / name)
        model.config._name_or_path = str(tmp_path / name)
        return model

    return save


@pytest.mark.parametrize(
    ("target", "draft", "same"),
    [(200, 200, True), (200, 202, True), (202, 200, True), (200, 203, False), (200, 97, False)],
)
def test_without_tokenizers_numbers_may_differ_by_padding(target, draft, same):
    assert same_vocabulary(sized(target), sized(draft)) is same


def test_tokenizers_know_better_than_numbers(saved):
    target = saved(sized(200), WORDS, "target")
    assert same_vocabulary(target, saved(sized(256), WORDS, "padded"))  # whatever the padding
    assert same_vocabulary(target, saved(sized(200), [*WORDS[:199], "other"], "special"))
    assert not same_vocabulary(target, saved(sized(200), WORDS[::-1], "shuffled"))
    assert not same_vocabulary(sized(200), sized(200), tokenizer(WORDS), tokenizer(WORDS[:150]))
    assert same_vocabulary(sized(200), sized(256), tokenizer(WORDS), tokenizer(WORDS))


@pytest.mark.parametrize("name", PLANS)
def test_every_method_that_drafts_says_the_same(name):
    model, inputs = sized(200), prompt(length=40)
    for draft, fits in ((sized(202), True), (sized(300), False)):
        if fits:
            with tt.apply(PLANS[name](draft), model):
                assert generate(model, inputs, 4).shape == (2, 44)
            continue
        with pytest.raises(tt.ThriftError) as error, tt.apply(PLANS[name](draft), model):
            generate(model, inputs, 4)
        said = (
            f"{name} cannot use this draft model, which has another vocabulary: it has 300 tokens and the target 200; "
        )
        assert str(error.value).startswith(said) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["speckv", "specpc"])
def test_as_many_tokens_of_another_tokenizer_are_refused_where_nothing_translates_them(name, saved):
    model, draft = saved(sized(200), WORDS, "target"), saved(sized(200), WORDS[::-1], "draft")
    with (
        pytest.raises(tt.ThriftError, match=f"{name} cannot use .* same tokenizer"),
        tt.apply(PLANS[name](draft), model),
    ):
        generate(model, prompt(length=40), 4)
    with tt.apply(PLANS["draft_model"](draft), model):  # which does
        assert generate(model, prompt(length=40), 4).shape == (2, 44)
