"""Selective Context against the authors' own code: alignment of tokens to units, aggregation, filter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenthrift.ops.tokens import Span
from tokenthrift.text.runtime import compress_text
from tokenthrift.text.selective_context import SelectiveContext, at_least_percentile, unit_information
from tokenthrift.text.spans import sentences

from .tiny import PROSE, scorer, tokenizer

FILE = np.load(Path(__file__).parents[1] / "golden" / "text" / "selective_context.npz")
GOLDEN: dict[str, Any] = {name: json.loads(str(FILE[name])) for name in FILE}


def laid_out(pieces: list[str], start: int = 0) -> list[Span]:
    """Spans of the pieces one after the other."""
    ends = start + np.cumsum([len(p) for p in pieces])
    return [(int(e) - len(p), int(e)) for p, e in zip(pieces, ends, strict=True)]


@pytest.mark.parametrize("level", ["sent", "phrase", "token"])
def test_unit_information_is_the_authors(level: str) -> None:
    scored: list[float] = []
    phrases = iter(GOLDEN["unit_text"]["phrase"])
    for tokens, nats, spacy in zip(GOLDEN["tokens"], GOLDEN["self_info"], GOLDEN["spacy_units"], strict=True):
        text = "".join(tokens)
        units = {
            "sent": [(0, len(text))],
            "phrase": laid_out([next(phrases).lstrip() if i == 0 else next(phrases) for i in range(len(spacy))]),
            "token": laid_out(tokens),
        }[level]
        triples = [(a, b, x) for (a, b), x in zip(laid_out(tokens), nats, strict=True)]
        scored += unit_information(text, triples, units)
    assert scored == pytest.approx(GOLDEN["unit_info"][level])


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['level']}-{c['reduce_ratio']}")
def test_the_filter_removes_what_the_authors_remove(case: dict[str, Any]) -> None:
    level = case["level"]
    keep = at_least_percentile(GOLDEN["unit_info"][level], 1 - case["reduce_ratio"])
    removed = [unit for unit, kept in zip(GOLDEN["unit_text"][level], keep, strict=True) if not kept]
    assert removed == case["removed"]


def test_a_unit_without_tokens_is_kept() -> None:
    information = unit_information("a  b", [(0, 1, 2.0), (3, 4, 1.0)], [(0, 1), (1, 3), (3, 4)])
    assert information == [2.0, float("inf"), 1.0]
    assert at_least_percentile(information, 0.1) == [True, True, False]
    assert at_least_percentile([], 0.5) == []


@pytest.mark.parametrize("level", ["token", "phrase", "sentence"])
def test_percentile_keeps_a_share_of_the_units(level: str) -> None:
    method = SelectiveContext(rate=0.5, level=level, compat="percentile")
    out = compress_text([method], PROSE, None, tokenizer(), scorer())
    assert 0.2 < out.rate < 0.8
    if level == "sentence":
        units = sentences(PROSE)
        kept = [u for u in units if any(a <= u[0] and u[1] <= b for a, b in out.kept)]
        assert len(kept) == len(units) / 2


@pytest.mark.packs
def test_the_surprising_is_kept() -> None:
    from tokenthrift import compress

    text = "The sun rises in the east and sets in the west. The code of the vault is 7-zebra-41."
    phrase = compress(text, "selective_context", rate=0.6)
    assert "vault" in phrase.text
    assert "sets in the west" not in phrase.text
    assert phrase.tokens_after <= 0.6 * phrase.tokens_before + 1
    sentence = compress(text, "selective_context", level="sentence", rate=0.6)
    assert sentence.text == "The code of the vault is 7-zebra-41."
