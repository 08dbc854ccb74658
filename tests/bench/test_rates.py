"""Scores that are computed once give what the method gives at every rate, or it is noticed that they do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tokenthrift.bench.facts import fact_questions
from tokenthrift.bench.random_models import RandomModels, random_models
from tokenthrift.bench.rates import AtRates, Models
from tokenthrift.core.method import find, methods
from tokenthrift.text.protect import Protection
from tokenthrift.text.runtime import compress_text

RATES = (0.6, 0.3)
POLICIES = (None, Protection.of("default"))
QUESTION = "What does the item return?"
BY_RATE = ("llmlingua", "longllmlingua", "word_head")
"""Whose scores depend on the rate: of what was read before, or of how much of the end stays."""


@pytest.fixture(scope="module")
def made() -> RandomModels:
    return random_models()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [passage.text for passage in fact_questions(4, 250, lambda text: len(text) // 4)][:3]


def at(name: str, made: RandomModels, **params: Any) -> AtRates:
    if name == "llmlingua2":
        params["model"] = made.classifier
    models = Models(made.tokenizer, made.scorer, made.embedder)
    return AtRates(lambda rate: find(name, "text").make(rate=rate, **params), RATES, models)


@pytest.mark.parametrize("name", [info.name for info in methods("text")])
def test_the_result_is_that_of_the_method(name: str, made: RandomModels, texts: list[str]) -> None:
    method = at(name, made)
    once = method.agrees(max(texts, key=len), QUESTION, POLICIES)
    assert once != (name in BY_RATE)
    for text in texts[:2]:
        found = {(rate, i): out.kept for rate, i, out in method.compress(text, QUESTION, POLICIES)}
        assert len(found) == 4
        for (rate, i), kept in found.items():
            run = method.methods[rate]
            assert kept == compress_text([run], text, QUESTION, *method.models, protect=POLICIES[i]).kept


def test_scores_are_computed_once(made: RandomModels, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    method = at("selective_context", made)
    calls = 0
    plain = made.scorer.self_information

    def counting(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return plain(*args)

    with patched(monkeypatch, made.scorer, counting):
        assert len(list(method.compress(texts[0], None, POLICIES))) == 4
        assert calls == 1
        method.once = False
        list(method.compress(texts[0], None, POLICIES))
        assert calls == 5


@contextmanager
def patched(monkeypatch: pytest.MonkeyPatch, scorer: Any, function: Any) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(scorer, "self_information", function)
        yield


def test_the_models_are_the_same_every_time(made: RandomModels) -> None:
    again = random_models().scorer.model.state_dict()
    assert all(value.equal(again[name]) for name, value in made.scorer.model.state_dict().items())
