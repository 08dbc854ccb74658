"""Draft models of another vocabulary, and trimmed ones."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tokenthrift as tt
from decoding.conftest import SMALL, VOCAB, repetitive_prompt
from decoding.draft_models import WORDS, near, padded, run, tokenizer
from tokenthrift.core.errors import ThriftError
from tokenthrift.core.plan import Plan
from tokenthrift.decoding.draft_model import DraftModel
from tokenthrift.decoding.protocols import Request
from tokenthrift.decoding.vocab_trim import TokenCounts, calibrate_vocabulary
from tokenthrift.decoding.vocabularies import TrimmedHead, Vocabulary, match

# ---- vocabularies ---------------------------------------------------------------------------------------------------


def resized(order, extra: int = 0):
    """The near llama with its vocabulary in another order, and random tokens at the end."""
    source = near("llama")
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": len(order) + extra}, num_key_value_heads=2)).eval()
    weights = source.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name][order], torch.randn(extra, 32)])
    model.load_state_dict(weights)
    return model


ORDER = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3)).tolist()


def test_another_vocabulary_is_mapped_by_its_strings(llama):
    options = {"do_sample": False, "max_new_tokens": 30}
    plain = llama.generate(**padded(), **options).tolist()
    _, same = run(DraftModel(model=near("llama"), adaptive=False), llama, padded(), **options)
    draft = resized(ORDER, extra=3)
    own = tokenizer([WORDS[i] for i in ORDER] + ["x", "y", "z"])
    method = DraftModel(model=draft, tokenizer=own, adaptive=False)
    with tt.apply(Plan(decode=method), llama, processor=tokenizer(WORDS)) as session:
        assert llama.generate(**padded(), **options).tolist() == plain
    record = session.records["decode"]
    assert (record.tokens_after, record.extra["accepted"]) == (same.tokens_after, same.extra["accepted"])


@pytest.mark.parametrize("extra", [-4, 0, 5])
@pytest.mark.parametrize("sample", [False, True])
def test_paddings_of_other_sizes(llama, extra, sample):
    draft = resized(list(range(VOCAB + min(extra, 0))), max(extra, 0))
    options = {"do_sample": sample, "max_new_tokens": 30}
    ours, record = run(DraftModel(model=draft, vocabulary="same", adaptive=False), llama, padded(), **options)
    if not sample:
        assert ours == llama.generate(**padded(), **options).tolist()
    assert record.extra["accepted"] > 10
    assert max(token for row in ours for token in row) < VOCAB


def test_vocabularies_that_cannot_be_compared_or_mapped_are_refused_in_one_line(llama):
    draft = resized(list(range(VOCAB)), extra=3)
    with pytest.raises(
        ThriftError, match=r"27 tokens and the target 24.*processor=TOKENIZER.*vocabulary='same'"
    ) as error:
        run(DraftModel(model=draft), llama, padded(), max_new_tokens=3)
    assert "\n" not in str(error.value)
    other = tokenizer([*WORDS[:9], *(f"other{i}" for i in range(18))])
    with pytest.raises(ThriftError, match="shares 9 of its 27 tokens"):
        match(llama, draft, tokenizer(WORDS), other, same=False)


def test_vocabularies_translate_there_and_back():
    vocabulary = Vocabulary(5, [2, -1, 0, 4, 7])  # 7: padding of the draft model
    assert vocabulary.encode([0, 2, 4, 3]) == [2, 0, 3, 0]
    wide = vocabulary.spread(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]))
    assert wide.tolist() == [[3.0, -math.inf, 1.0, -math.inf, 4.0]]
    assert vocabulary.keep({4, 2}) == [0, 3]
    assert vocabulary.spread(torch.tensor([[1.0, 4.0]])).tolist() == [[-math.inf, -math.inf, 1.0, -math.inf, 4.0]]
    assert vocabulary.encode([0]) == [2]  # texts may still have all
    same = Vocabulary(3, range(3))
    logits = torch.randn(2, 3)
    assert same.spread(logits) is logits


# ---- VocabTrim ------------------------------------------------------------------------------------------------------


@pytest.fixture
def counts(tmp_path):
    """``counts(tokens)``: a file that has counted these, the first most often."""

    def write(tokens, always=(1,)):
        path = tmp_path / "counts.json"
        TokenCounts(VOCAB, {t: 100 - i for i, t in enumerate(tokens)}, always).save(path)
        return str(path)

    return write


def test_a_trimmed_head_computes_the_same_logits_for_what_is_left(model):
    ids, kept = torch.tensor([repetitive_prompt(0)]), [5, 2, 17]
    full, head = model.get_output_embeddings(), TrimmedHead(model, kept)
    with torch.no_grad():
        expected = model(ids).logits[..., kept]
        for _ in range(2):
            with head:
                torch.testing.assert_close(model(ids).logits, expected)
            assert model.get_output_embeddings() is full
        assert model(ids).logits.shape[-1] == VOCAB


@pytest.mark.parametrize("sample", [False, True])
def test_trimmed_drafts_hold_kept_tokens_only_and_change_nothing(llama, counts, sample):
    kept = {3, 4, 7, 9, 12, 15}
    seen = []
    method = DraftModel(model=near("llama"), trim=counts(kept), adaptive=False)
    drafters = method.start_batch([[3, 4], [5]], Request(llama, [], sample, frozenset({8})))
    drafters.extend([[2], [6]])
    with torch.no_grad():
        for draft in drafters.propose([7, 7]):
            seen += draft.tokens
    assert len(seen) == 14 and set(seen) <= kept | {1, 8}
    options = {"do_sample": False, "max_new_tokens": 30}
    assert run(method, llama, padded(), **options)[0] == llama.generate(**padded(), **options).tolist()


def test_all_tokens_kept_is_the_untrimmed_draft(llama, counts):
    options = {"do_sample": False, "max_new_tokens": 30}
    records = [
        run(DraftModel(model=near("llama"), trim=trim, adaptive=False), llama, padded(), **options)[1].extra
        for trim in (None, counts(range(VOCAB)))
    ]
    assert [(r["drafted"], r["accepted"]) for r in records[:1]] == [(r["drafted"], r["accepted"]) for r in records[1:]]


def test_counts_are_of_what_the_target_writes(llama, tmp_path):
    words = tokenizer(WORDS)
    prompts = [" ".join(WORDS[t] for t in repetitive_prompt(seed)) for seed in range(3)]
    told = []
    counts = calibrate_vocabulary(llama, words, prompts, max_new_tokens=10, progress=lambda *at: told.append(at))
    written = torch.cat(
        [
            llama.generate(torch.tensor([repetitive_prompt(seed)]), do_sample=False, max_new_tokens=10)[0, 24:]
            for seed in range(3)
        ]
    ).bincount(minlength=VOCAB)
    assert counts.counts == {t: n for t, n in enumerate(written.tolist()) if n}
    assert told == [(1, 3), (2, 3), (3, 3)]
    path = tmp_path / "counts.json"
    counts.save(path)
    assert TokenCounts.load(path) == counts
    [best] = counts.top(1) - set(counts.always)
    assert written[best] == written.max()
    with pytest.raises(ThriftError, match="at least one prompt"):
        calibrate_vocabulary(llama, words, [])


def test_files_that_are_no_counts_are_refused(llama, tmp_path, counts):
    wrong = tmp_path / "wrong.json"
    for text, says in (
        ("{", "cannot read token counts"),
        ('{"vocabulary": 3}', "calibrate_vocabulary"),
        (json.dumps({"vocabulary": 3, "always": [], "counts": {"7": 1}}), "does not have"),
    ):
        wrong.write_text(text)
        with pytest.raises(ThriftError, match=says) as error:
            TokenCounts.load(wrong)
        assert "\n" not in str(error.value)
    with pytest.raises(ThriftError, match="No such file"):
        TokenCounts.load(tmp_path / "none.json")
    wrong.write_text(json.dumps({"vocabulary": 3, "always": [], "counts": {"2": 1}}))
    with pytest.raises(ThriftError, match="counts 3 tokens, the target has 24"):
        run(DraftModel(model=near("llama"), trim=str(wrong)), llama, padded(), max_new_tokens=3)
