"""LLMLingua-2 against the authors' own code, and what it does better: words of any tokenizer, one budget for all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokenthrift.core.errors import ThriftError
from tokenthrift.core.method import find
from tokenthrift.core.plan import Plan
from tokenthrift.models.token_classifier import TokenClassifier, chunks, load_token_classifier
from tokenthrift.text.compressed import CompressedText
from tokenthrift.text.llmlingua2 import LLMLingua2
from tokenthrift.text.llmlingua2_words import authors_chunks, authors_keep, authors_words
from tokenthrift.text.runtime import compress_text
from tokenthrift.text.spans import join, words

from .tiny import PROSE, classifier, tokenizer

FILE = np.load(Path(__file__).parents[1] / "golden" / "text" / "llmlingua2_words.npz")
PIECES: list[str] = json.loads(str(FILE["pieces"]))
KEPT = torch.from_numpy(FILE["logits"])[0].softmax(-1)[1 : len(PIECES) + 1, 1].numpy()
CASES: list[dict[str, Any]] = json.loads(str(FILE["cases"]))


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v) for v in list(c.values())[:5]))
def test_the_authors_words_and_choice(case: dict[str, Any]) -> None:
    force = case.get("force_tokens", [])
    made = authors_words(PIECES, KEPT.tolist(), force=force, digits=case.get("force_reserve_digit", False))
    assert [word.text.lstrip("▁") for word in made] == case["words"]
    kept = authors_keep(
        [word.text for word in made],
        [word.probability(case.get("token_to_word", "mean")) for word in made],
        1 - case["reduce_rate"] if "reduce_rate" in case else 0.5,
        [max(1, math.ceil(len(word.text) / 4)) for word in made],
        force=force,
        drop_consecutive=case.get("drop_consecutive", False),
        threshold=0.5 if "slingua" in str(case) else None,
    )
    assert kept == [bool(label) for label in case["labels"]]
    text = "".join(word.text for word, keep in zip(made, kept, strict=True) if keep)
    assert text.replace("▁", " ").strip() == case["compressed"]


def test_the_authors_words_of_wordpieces() -> None:
    golden = json.loads(str(FILE["mbert"]))
    made = authors_words(
        golden["tokens"], golden["probs"], force=golden["force_tokens"], digits=True, wordpiece=True,
        special={"[CLS]", "[SEP]"},
    )  # fmt: skip
    assert [word.text for word in made] == golden["words"]
    assert [word.forced for word in made] == golden["word_piece_probs"]
    assert [word.plain for word in made] == golden["word_piece_probs_no_force"]
    assert [word.probability("mean") for word in made] == pytest.approx(golden["word_probs_mean"])


def test_the_authors_scores_of_documents() -> None:
    for documents, score in zip(json.loads(str(FILE["context_split"])), FILE["context_probs"], strict=True):
        found: list[float] = []
        for a, b in documents:  # every chunk stands at the start of a row of its own
            found += [float(np.mean(w.plain)) for w in authors_words(PIECES[a:b], KEPT[: b - a].tolist())]
        assert np.mean(found) == pytest.approx(score)


@pytest.mark.parametrize("length", ["12", "18", "40", "200"])
def test_the_authors_chunks(length: str) -> None:
    golden = json.loads(str(FILE["chunks"]))[length]
    found = authors_chunks(PIECES, int(length) - 2, {".", "\n"})
    assert [" ".join(PIECES[a:b]) for a, b in found] == golden


# ---- the method -----------------------------------------------------------------------------------------------------


def run(text: str = PROSE, **params: Any) -> CompressedText:
    method = find("llmlingua2", "text").make(**{"model": classifier(), **params})
    return compress_text([method], text, None, tokenizer())


class Fixed(TokenClassifier):
    """Every token of the words named is likely, no other is."""

    def __init__(self, *likely: str) -> None:
        super().__init__(classifier().model, tokenizer())
        self.likely = likely

    def probabilities(self, text: str) -> list[tuple[int, int, float]]:
        spans = [(m, m + len(w)) for w in self.likely for m in range(len(text)) if text.startswith(w, m)]
        found = super().probabilities(text)
        return [(a, b, 0.9 if any(x < b and a < y for x, y in spans) else 0.1 + 1e-3 * p) for a, b, p in found]


def test_likely_words_stay() -> None:
    out = run(model=Fixed("Lisbon", "blue-heron-77"), rate=0.1)
    assert "Lisbon" in out.text and "blue-heron-77" in out.text


def test_forced_words_and_digits_stay_whole() -> None:
    out = run(rate=0.5, force_digits=True, force_tokens=["not", "Ana"])
    for word in ("1998", "412.50", "14", "310,000", "2011", "blue-heron-77", " not", " Ana"):
        assert word in out.text
    lines = run("one\ntwo three\nfour five six", rate=0.6, force_tokens=["\n"])
    assert lines.text.count("\n") == 2


def test_repeated_forced_words_are_dropped() -> None:
    text = "go! yes! yes! no! yes! yes! go"
    assert run(text, rate=0.7, force_tokens=["!"], model=Fixed("go")).text.count("!!") > 0
    assert "!!" not in run(text, rate=0.7, force_tokens=["!"], drop_consecutive=True, model=Fixed("go")).text


def test_unlikely_documents_go_first() -> None:
    text = "alpha beta gamma delta.\n\none two three four.\n\nred green blue black."
    out = run(text, model=Fixed("alpha beta gamma", "one two three", "black"), rate=0.5, document_rate=0.67)
    assert "black" not in out.text
    assert "black" in run(text, model=Fixed("alpha beta gamma", "one two three", "black"), rate=0.5).text


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8, 30])
def test_the_authors_choice_is_made_of_spans(rate: float) -> None:
    out = run(PROSE, rate=rate, compat="llmlingua")
    assert join(PROSE, out.kept) == out.text and out.kept == sorted(out.kept)
    assert 0 < out.tokens_after < out.tokens_before
    assert run(PROSE, rate=1.0, compat="llmlingua").text == PROSE


def test_windows_do_not_lose_tokens() -> None:
    short, long = classifier(16), classifier(64)
    for judge in (short, long):
        found = judge.probabilities(PROSE * 3)
        assert found[-1][1] == len(PROSE) * 3
        assert all(0 < p < 1 for _, _, p in found)
    alone = long.of_pieces([[5, 6, 7]])[0]
    together = long.of_pieces([[5, 6, 7], list(range(10, 50))])[0]
    assert together.tolist() == pytest.approx(alone.tolist(), abs=1e-5)


def test_chunks_end_with_sentences() -> None:
    ends = [i % 5 == 4 for i in range(23)]
    assert chunks(ends, 12) == [(0, 10), (10, 20), (20, 23)]
    assert chunks([False] * 25, 10) == [(0, 10), (10, 20), (20, 25)]
    assert chunks([], 10) == []


def test_a_folder_is_loaded_once(tmp_path: Path) -> None:
    classifier().model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    call = f"llmlingua2(model={str(tmp_path)!r}, rate=0.5)"
    out = compress_text(Plan.parse(call).at("text"), PROSE, None, tokenizer())
    assert out.text == run(rate=0.5).text
    assert load_token_classifier(str(tmp_path)) is load_token_classifier(str(tmp_path))


def test_mistakes_are_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ThriftError, match="none"):
        LLMLingua2(model=str(tmp_path / "none")).load()
    for params, said in [
        ({"model": 3}, "a folder, a hub id or"),
        ({"by": "max"}, "no by 'max'"),
        ({"compat": "paper"}, "no compat"),
        ({"force_tokens": "?"}, "as a list of words"),
        ({"document_rate": 0.0}, "outside"),
        ({"rate": 0}, "keeps nothing"),
    ]:
        with pytest.raises(ThriftError, match=said):
            find("llmlingua2", "text").make(**params)
    with pytest.raises(ThriftError, match="words of one piece"):
        run(compat="llmlingua", force_tokens=["Nobody remembers"])


def test_words_are_kept_or_dropped_as_a_whole() -> None:
    out = run(rate=0.4)
    units = [u for u in words(PROSE) if any(a <= u[0] and u[1] <= b for a, b in out.kept)]
    assert join(PROSE, units) == out.text
