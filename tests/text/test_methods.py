"""What every text method guarantees, whatever the text; and what each of them chooses."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tokenthrift.core.errors import ThriftError
from tokenthrift.core.method import find, methods
from tokenthrift.core.plan import Plan
from tokenthrift.core.view import Lazy
from tokenthrift.ops.tokens import count_tokens, token_spans
from tokenthrift.text.compressed import CompressedText
from tokenthrift.text.documents import Units, split_documents
from tokenthrift.text.embedding_sentences import EmbeddingSentences
from tokenthrift.text.runtime import compress_text
from tokenthrift.text.spans import bridges, disjoint, join, phrases, sentences, words
from tokenthrift.text.truncate import Truncate

from .tiny import (
    PROSE,
    HashingEmbedder,
    classifier,
    language_model,
    scorer,
    sequence_classifier,
    tokenizer,
    word_scorer,
)

UNITS = {
    "truncate": words,
    "truncate(where=tail)": words,
    "truncate(where=middle)": words,
    "selective_context": phrases,
    "selective_context(level=sentence)": sentences,
    "selective_context(level=token)": lambda text: disjoint(
        (a, b) for a, b, _ in scorer().self_information(text, sentences(text))
    ),
    "selective_context(context=document)": phrases,
    "embedding_sentences": sentences,
    "llmlingua": words,
    "llmlingua2": words,
    "llmlingua2(by=first)": words,
    "longllmlingua": lambda text: Units.of(text, split_documents(text, "\n\n")).spans,
    "random_words": words,
    "bm25_sentences": sentences,
    "recomp_extractive": sentences,
    "exit": sentences,
    "tcra": words,
    "tcra(rounds=3)": words,
    "frugal_prompt": words,
    "frugal_prompt(attribution=globenc)": words,
    "specpc_text": words,
    "word_head": phrases,
    "word_head(level=word, tail=0)": words,
}
STEPWISE = ("llmlingua", "longllmlingua")
"""What these keep of a segment is read by the next: a smaller rate need not keep a subset."""
QUESTIONS = dict.fromkeys(("bm25_sentences", "recomp_extractive", "exit"), "Who has the keys of the porter?")
MODELS = {
    "exit": lambda: (language_model(2048), tokenizer()),
    "frugal_prompt": sequence_classifier,
    "llmlingua2": classifier,
    "word_head": word_scorer,
}
TEXTS = (
    st.text(st.sampled_from("aB1., \n日🙂é\t?"), max_size=40)
    | st.text(max_size=40)
    | st.lists(st.sampled_from(PROSE.split(" ")), max_size=30).map(" ".join)
)
RATES = st.floats(0.01, 1) | st.integers(1, 40)


def run(call: str, text: str, question: str | None = None, **params: Any) -> CompressedText:
    step = next(iter(Plan.parse(call)))
    own = {"model": MODELS[step.name]()} if step.name in MODELS else {}
    method = step.info.make(**{**step.params, **own, **params})
    question = question or QUESTIONS.get(step.name)
    return compress_text([method], text, question, tokenizer(), Lazy(scorer), HashingEmbedder())


def test_the_table_above_has_every_text_method() -> None:
    tested = {call.split("(")[0] for call in UNITS}
    assert tested >= {m.name for m in methods("text") if m.cls.__module__.startswith("tokenthrift.text.")}


@pytest.mark.parametrize("call", UNITS)
@given(text=TEXTS, rate=RATES)
@example(text="", rate=0.5)
@example(text=" \n ", rate=0.5)
@example(text="🙂", rate=0.5)
def test_whole_spans_in_order_within_the_budget(call: str, text: str, rate: float) -> None:
    out = run(call, text, rate=rate)
    assert out.original == text
    assert join(text, out.kept) == out.text == str(out)
    assert out.kept == sorted(out.kept)
    assert all(a[1] < b[0] for a, b in zip(out.kept, out.kept[1:], strict=False))
    assert all(a < b for a, b in out.kept)
    assert (out.map.n_in, out.map.n_out) == (len(text), len(out.text))

    total = count_tokens(tokenizer(), text)
    target = min(rate, total) if isinstance(rate, int) else max(int(total * rate + 0.5), 1)
    units = UNITS[call](text)
    alone = [count_tokens(tokenizer(), join(text, [unit])) for unit in units]
    inside = [unit for unit in units if any(a <= unit[0] and unit[1] <= b for a, b in out.kept)]
    cut_word = call.startswith("truncate") and len(inside) == 0
    assert (out.tokens_before, out.tokens_after) == (total, count_tokens(tokenizer(), out.text))
    assert out.tokens_after <= target or len(inside) == 1
    spans = inside if call.startswith("truncate") else bridges(text, inside)
    assert cut_word or join(text, spans) == out.text
    if call in ("truncate", "truncate(where=tail)") and not cut_word:
        assert target - out.tokens_after <= max(alone, default=0)


@pytest.mark.parametrize("call", UNITS)
@given(text=TEXTS)
def test_a_rate_of_one_changes_nothing(call: str, text: str) -> None:
    out = run(call, text, rate=1.0)
    assert out.text == text
    assert out.tokens_after == out.tokens_before
    assert out.rate == 1


@pytest.mark.parametrize("call", sorted(set(UNITS) - {"tcra(rounds=3)"}))
def test_runs_agree_and_a_smaller_rate_keeps_a_subset_but_for_what_fills_up(call: str) -> None:
    last: set[int] = set()
    filled = 0 if call.startswith("truncate") else max(b - a for a, b in UNITS[call](PROSE))
    for rate in (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0):
        out = run(call, PROSE, rate=rate)
        assert out.kept == run(call, PROSE, rate=rate).kept
        chars = {i for a, b in out.kept for i in range(a, b)}
        assert call in STEPWISE or len(last - chars) <= filled
        last = chars


@pytest.mark.parametrize("rate", [0.0, -0.5, 1.5, float("nan"), float("inf"), 0, -3, "half", True, None])
@pytest.mark.parametrize("name", sorted({call.split("(")[0] for call in UNITS}))
def test_rates_that_are_none(name: str, rate: Any) -> None:
    with pytest.raises(ThriftError):
        find(name, "text").make(rate=rate)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("truncate(where=tails)", "did you mean 'tail'"),
        ("selective_context(level=word)", "no level 'word'"),
        ("word_head(level=sentence)", "no level 'sentence'"),
        ("word_head(tail=1.5)", "outside \\[0, 1\\]"),
        ("selective_context(context=page)", "use sentence or document"),
        ("selective_context(compat=paper)", "use budget or percentile"),
        ("selective_context(compat=percentile, rate=20)", "needs a rate such as 0.5"),
    ],
)
def test_parameters_that_do_not_exist(call: str, said: str) -> None:
    with pytest.raises(ThriftError, match=said):
        Plan.parse(call)


# ---- truncate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "rate", "expected"),
    [
        ("head", 4, "one two three four"),
        ("tail", 4, " five six seven eight"),
        ("middle", 4, "one two seven eight"),
        ("middle", 5, "one two three seven eight"),
        ("head", 100, "one two three four five six seven eight"),
    ],
)
def test_what_truncate_keeps(where: str, rate: int, expected: str) -> None:
    class Words:
        """Every word is a token."""

        is_fast = True

        def __call__(self, text: str | list[str], **_: Any) -> dict[str, Any]:
            if isinstance(text, str):
                return {"input_ids": text.split()}
            rows = [words(t) for t in text]
            return {"input_ids": rows, "offset_mapping": rows}

    text = "one two three four five six seven eight"
    out = compress_text([Truncate(rate=rate, where=where)], text, None, Words())
    assert out.text == expected


def test_truncate_cuts_a_word_only_if_no_word_fits() -> None:
    assert PROSE.startswith(run("truncate", PROSE, rate=0.3).text + ";")
    blob = "kx" * 200
    out = run("truncate", blob, rate=0.25)
    assert out.tokens_after == round(out.tokens_before * 0.25)
    assert out.text[-1] == blob[token_spans(tokenizer(), blob)[out.tokens_after - 1][1] - 1]


@pytest.mark.parametrize("unit", ["word, ", "x", "日", " ", "\n"])
def test_truncate_of_one_long_line_takes_no_time(unit: str) -> None:
    out = run("truncate", unit * (200_000 // len(unit)), rate=0.1)
    assert out.tokens_after <= out.tokens_before * 0.1 + 1
    assert out.seconds < 20


# ---- embedding_sentences --------------------------------------------------------------------------------------------


def test_the_question_decides() -> None:
    out = run("embedding_sentences", PROSE, question="Who has the keys of the porter?", rate=0.2)
    assert "The keys are with the porter." in out.text
    assert "Lisbon" not in out.text
    out = run("embedding_sentences", PROSE, question="When did Mr. Hale move to Lisbon?", rate=0.2)
    assert "Lisbon" in out.text


def test_without_a_question_the_typical_is_kept() -> None:
    text = "Zebras graze far away. The plan saves cost. The plan saves time. The plan saves cost and time."
    assert "Zebras" not in run("embedding_sentences", text, rate=0.7).text


def test_one_sentence_needs_no_embedder() -> None:
    out = compress_text([EmbeddingSentences(rate=0.1)], "Only one.", None, tokenizer(), embedder=None)
    assert out.text == "Only one."
