"""LLMLingua and LongLLMLingua as text methods: documents, words, order, and the answer mended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenthrift.core.errors import ThriftError
from tokenthrift.core.plan import Plan
from tokenthrift.models.scoring import Scorer
from tokenthrift.ops.tokens import count_tokens
from tokenthrift.text.compressed import CompressedText
from tokenthrift.text.documents import Units, reordered, split_documents
from tokenthrift.text.recovery import recover
from tokenthrift.text.runtime import compress_text
from tokenthrift.text.spans import join, words

from .tiny import PROSE, language_model, tokenizer

RECOVER = np.load(Path(__file__).parents[1] / "golden" / "text" / "longllmlingua_recover.npz")
DOCUMENTS = "\n\n".join(
    ["The first document is about the keys of the porter.", "The second says what the rent was: $412.50.", "A third."]
)


def run(call: str, text: str, question: str | None = None) -> CompressedText:
    judge = Scorer(language_model(512), tokenizer())
    return compress_text(Plan.parse(call).at("text"), text, question, tokenizer(), judge)


@pytest.mark.parametrize("text", ["Three words only.", PROSE, PROSE * 4], ids=["short", "one segment", "several"])
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_short_texts_and_last_segments_are_compressed_too(text: str, rate: float) -> None:
    out = run(f"llmlingua(rate={rate}, size=60)", text)
    assert out.tokens_after <= max(out.tokens_before * rate + 0.5, 3)
    assert out.tokens_after >= out.tokens_before * rate - 12
    if text != "Three words only.":
        quarter = [(a, b) for a, b in words(text) if a > len(text) * 0.75]
        kept = [w for w in quarter if any(a <= w[0] and w[1] <= b for a, b in out.kept)]
        assert 0 < len(kept) < len(quarter)


def test_the_authors_version_misses_what_the_other_does() -> None:
    text = "A short text, not longer than one segment."
    assert run("llmlingua(rate=0.3, compat=llmlingua)", text).text == text
    assert run("llmlingua(rate=0.3)", text).tokens_after < count_tokens(tokenizer(), text) / 2


def test_tokens_may_be_cut_words_are_not() -> None:
    whole = {PROSE[a:b].strip() for a, b in words(PROSE)}
    by_word = run("llmlingua(rate=0.4)", PROSE)
    units = [u for u in words(PROSE) if any(a <= u[0] and u[1] <= b for a, b in by_word.kept)]
    # White space that keeps them apart is kept too.
    assert "".join(join(PROSE, units).split()) == "".join(by_word.text.split())
    by_token = run("llmlingua(rate=0.4, level=token)", PROSE)
    assert not {by_token.text[a:b].strip() for a, b in words(by_token.text)} <= whole


def test_documents_are_split_without_loss() -> None:
    text = f"\n \n{DOCUMENTS}\n\n\n "
    documents = split_documents(text, "\n\n")
    assert [text[a:b].strip() for a, b in documents] == DOCUMENTS.split("\n\n")
    units = Units.of(text, documents)
    assert join(text, units.spans) == text
    assert [text[a:b] for (a, b), gap in zip(units.spans, units.gap, strict=True) if gap] == ["\n\n", "\n\n"]
    assert split_documents(text, "") == split_documents("x" * len(text), "\n\n") == [(0, len(text))]
    assert split_documents("", "\n\n") == [(0, 0)]


def test_documents_are_dropped_as_a_whole() -> None:
    out = run("llmlingua(rate=0.3, separator='\\n\\n', spare=0)", DOCUMENTS)
    left = [d for d in split_documents(DOCUMENTS, "\n\n") if any(a < d[1] and d[0] < b for a, b in out.kept)]
    assert len(left) < 3
    assert not out.text.startswith("\n")


def test_another_order_is_a_permutation() -> None:
    documents = split_documents(DOCUMENTS, "\n\n")
    everything = sorted([*documents, (documents[0][1], documents[1][0]), (documents[1][1], documents[2][0])])
    assert join(DOCUMENTS, reordered(everything, documents, [2, 0, 1])).split("\n\n") == [
        DOCUMENTS.split("\n\n")[i] for i in (2, 0, 1)
    ]
    assert reordered(everything, documents, [1, 2]) == everything[2:]
    assert join(DOCUMENTS, reordered(everything, documents, [1])) == DOCUMENTS.split("\n\n")[1]


def test_the_best_document_comes_first_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenthrift.text.longllmlingua.by_question", lambda *_: [1, 2, 0])
    first = run("longllmlingua(rate=0.8, order=relevance)", DOCUMENTS, "What was the rent?")
    plain = run("longllmlingua(rate=0.8)", DOCUMENTS, "What was the rent?")
    assert first.kept != sorted(first.kept) and plain.kept == sorted(plain.kept)
    assert first.tokens_after <= first.tokens_before * 0.8 + 0.5
    assert join(DOCUMENTS, first.kept) == first.text
    assert {c for a, b in first.kept for c in range(a, b)} <= set(range(len(DOCUMENTS)))
    assert sum(b - a for a, b in first.kept) == len({c for a, b in first.kept for c in range(a, b)})
    at = first.text.find
    assert at("rent") < at("third") or at("third") < 0


def test_better_documents_keep_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def share(ranking: list[int]) -> float:
        monkeypatch.setattr("tokenthrift.text.longllmlingua.by_question", lambda *_: ranking)
        out = run("longllmlingua(rate=0.5, spread=0.5)", DOCUMENTS, "What was the rent?")
        a, b = split_documents(DOCUMENTS, "\n\n")[1]
        return sum(a <= c < b for x, y in out.kept for c in range(x, y)) / (b - a)

    assert share([1, 0, 2]) > share([0, 2, 1])


def test_the_question_changes_what_is_kept() -> None:
    asked = [run("longllmlingua(rate=0.4)", DOCUMENTS, q).kept for q in ("Who is the porter?", "$412.50", None)]
    assert len({str(kept) for kept in asked}) == 3


@pytest.mark.parametrize("call", ["llmlingua(compat=llmlingua, size=20)", "longllmlingua(compat=llmlingua, size=20)"])
@pytest.mark.parametrize("question", [None, "Who is the porter?"])
def test_the_authors_version_is_a_subsequence(call: str, question: str | None) -> None:
    out = run(call, DOCUMENTS, question)
    assert out.kept == sorted(out.kept)
    assert join(DOCUMENTS, out.kept) == out.text
    assert 0 < out.tokens_after < out.tokens_before


def test_a_question_longer_than_the_positions() -> None:
    judge = Scorer(language_model(), tokenizer())
    method = Plan.parse("longllmlingua(rate=0.5)").at("text")
    out = compress_text(method, DOCUMENTS * 3, "Who is the porter? " * 50, tokenizer(), judge)
    assert 0 < out.tokens_after <= out.tokens_before / 2 + 1
    with pytest.raises(ThriftError, match="reads 64 tokens at once, here are 161"):
        compress_text(Plan.parse("llmlingua(compat=llmlingua)").at("text"), PROSE, None, tokenizer(), judge)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("llmlingua(level=wrd)", "did you mean 'word'"),
        ("llmlingua(compat=paper)", "no compat 'paper'"),
        ("llmlingua(size=1)", "size of at least 2"),
        ("longllmlingua(order=best)", "no order 'best'"),
        ("longllmlingua(spread=2.0)", "outside"),
        ("longllmlingua(spare=-1)", "spare of at least 0"),
    ],
)
def test_parameters_that_do_not_exist(call: str, said: str) -> None:
    with pytest.raises(ThriftError, match=said):
        Plan.parse(call)


class Words:
    """Every word is a token."""

    is_fast = True

    def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
        import re

        found = [list(re.finditer(r"\S+", text)) for text in texts]
        ids = [[hash(m.group()) for m in row] for row in found]
        return {"input_ids": ids, "offset_mapping": [[m.span() for m in row] for row in found]}


@pytest.mark.parametrize(("answer", "mended"), json.loads(str(RECOVER["cases"])))
def test_answers_are_mended_like_the_authors_do(answer: str, mended: str) -> None:
    original, compressed = (json.loads(str(RECOVER[name])) for name in ("original", "compressed"))
    assert recover(original, compressed, answer, Words()) == mended


@pytest.mark.parametrize("answer", ["", " ", "no such words", "  Nobel Prize  "])
def test_answers_that_quote_little(answer: str) -> None:
    assert recover("the Nobel Prize", "Nobel Prize", answer, tokenizer()) == answer


@pytest.mark.packs
def test_a_fact_among_commonplaces_is_kept() -> None:
    from tokenthrift import compress

    text = "The sun rises in the east and sets in the west. The code of the vault is 7-zebra-41."
    assert "7-zebra-41" in compress(text, "llmlingua", rate=0.6).text


@pytest.mark.parametrize(
    "other",
    [
        "cache=streaming_llm(budget=16)",
        "cache=knorm(budget=8, every=4)",
        "prefill=lazy_llm(keep=0.5)",
        "decode=prompt_lookup()",
    ],
)
@pytest.mark.parametrize("method", ["llmlingua", "selective_context"])
def test_other_stages_do_not_touch_what_the_scorer_reads(method: str, other: str) -> None:
    from tokenthrift import apply

    text = f"text={method}(rate=0.5)"
    with apply(text, language_model(512), tokenizer()) as session:
        alone = session.compress(PROSE)
    with apply(f"{text} {other}", language_model(512), tokenizer()) as session:
        beside = session.compress(PROSE)
        assert session.report().flops == 0
    assert beside.kept == alone.kept
