"""The one place that turns scores into a choice: within the budget, near the budget, and quickly."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenthrift.core.errors import ThriftError
from tokenthrift.ops.tokens import Span, count_tokens
from tokenthrift.text import selection
from tokenthrift.text.protect import Protection
from tokenthrift.text.selection import Terms, best_within, under
from tokenthrift.text.spans import bridges, join, phrases, sentences, words

from .tiny import PROSE, tokenizer

SPLITTERS = {"words": words, "phrases": phrases, "sentences": sentences}


def size(text: str, spans: Sequence[Span]) -> int:
    return count_tokens(tokenizer(), join(text, spans))


def document(n_words: int, seed: int = 0) -> str:
    """Prose in random order, in sentences and paragraphs."""
    draw = random.Random(seed)
    vocabulary = PROSE.split()
    out = []
    for i in range(n_words):
        out.append(draw.choice(vocabulary) + (".\n\n" if i % 61 == 60 else ". " if i % 13 == 12 else " "))
    return "".join(out)


def scored(units: Sequence[Span], seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [draw.random() for _ in units]


@pytest.mark.parametrize("split", SPLITTERS)
@given(n=st.integers(1, 400), target=st.integers(1, 400), seed=st.integers(0, 9))
def test_less_than_one_unit_of_the_budget_is_unused(split: str, n: int, target: int, seed: int) -> None:
    text = document(n, seed)
    units = SPLITTERS[split](text)
    kept = best_within(text, units, scored(units, seed), target, tokenizer())
    if target >= count_tokens(tokenizer(), text):
        assert kept == units
        return
    chosen = [u for u in units if u in set(kept)]
    assert kept == bridges(text, chosen)
    assert size(text, kept) <= target or len(chosen) == 1
    if size(text, kept) == target:
        return
    for left_out in set(units) - set(chosen):  # nothing more would have fitted
        more = bridges(text, sorted([*chosen, left_out]))
        assert size(text, more) > target


@pytest.mark.parametrize(("split", "rate"), [("words", 0.5), ("phrases", 0.2), ("sentences", 0.33), ("words", 0.9)])
def test_long_texts_are_met_as_exactly_and_with_few_counts(
    split: str, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = document(12_000)
    units = SPLITTERS[split](text)
    counted: list[int] = []
    plain = selection.count_tokens

    def counting(tokenizer: Any, text: str) -> int:
        counted.append(len(text))
        return plain(tokenizer, text)

    monkeypatch.setattr(selection, "count_tokens", counting)
    kept = best_within(text, units, scored(units), rate, tokenizer())
    target = int(count_tokens(tokenizer(), text) * rate + 0.5)
    longest = max(size(text, [u]) for u in units)
    assert target - (0 if split == "words" else longest) <= size(text, kept) <= target
    assert sum(counted) < 16 * len(text)  # some counts of the whole, and many of a neighbourhood


def test_short_and_long_texts_are_treated_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    text = document(3_000)
    units = phrases(text)
    scores = scored(units)
    long_way = best_within(text, units, scores, 0.4, tokenizer())
    monkeypatch.setattr(selection, "SHORT", 10**9)
    exact = best_within(text, units, scores, 0.4, tokenizer())
    different = set(long_way) ^ set(exact)
    assert len(different) <= 0.01 * len(exact)  # at the end of the ranking alone


def test_a_prefix_of_the_ranking_is_nested() -> None:
    text = document(300)
    units = words(text)
    last: set[Span] = set()
    for rate in (0.01, 0.1, 0.3, 0.5, 0.8, 1.0):
        kept = set(best_within(text, units, scored(units), rate, tokenizer(), fill=False)) & set(units)
        assert last <= kept
        last = kept
    assert last == set(units)


def test_the_best_that_fits_is_kept_if_the_best_does_not() -> None:
    text = "A very long sentence that nobody could ever fit into it. Short. Also short."
    units = sentences(text)
    assert join(text, best_within(text, units, [3, 1, 2], 10, tokenizer())) == "Also short."
    terms = Terms()
    with under(terms):
        assert best_within(text, units, [3, 1, 2], 1, tokenizer()) == [units[0]]
    assert "no unit has at most the 1 tokens" in terms.notes[0]


def test_scores_that_are_no_numbers_rank_last() -> None:
    text = "one two three"
    units = words(text)
    kept = best_within(text, units, [float("nan"), -1.0, float("-inf")], 0.3, tokenizer(), fill=False)
    assert units[0] not in kept
    with pytest.raises(ThriftError, match="3 units need as many scores, got 2"):
        best_within(text, units, [1, 2], 0.5, tokenizer())


def test_a_tokenizer_that_cannot_point_is_enough() -> None:
    def slow(text: str, **_: Any) -> dict[str, list[str]]:
        return {"input_ids": text.split()}

    text = document(5_000)
    units = words(text)
    kept = best_within(text, units, scored(units), 700, slow)
    assert len(join(text, kept).split()) == 700


# ---- protected spans ------------------------------------------------------------------------------------------------


def test_protected_spans_are_kept_first_and_units_are_divided_at_them() -> None:
    text = "The meeting is on Monday. Look at https://example.org/c for the rent. Nobody came. Bring cake."
    with under(Terms(Protection.of("url"))):
        kept = join(text, best_within(text, sentences(text), [0, 0, 1, 2], 0.4, tokenizer()))
    assert kept.startswith(" https://example.org/c ")
    assert kept.endswith("Bring cake.")
    assert "Monday" not in kept and "rent" not in kept


def test_numbers_stay_in_what_is_kept_of_a_sentence_and_go_with_the_whole_of_it() -> None:
    text = "The meeting is on Monday. The rent is 310,000 euros a year. Nobody came. Bring cake."
    with under(Terms(Protection.of("number"))):
        whole = join(text, best_within(text, sentences(text), [0, 0, 1, 2], 0.35, tokenizer()))
        parts = join(text, best_within(text, words(text), [0] * len(words(text)), 0.35, tokenizer()))
    assert "310,000" not in whole
    assert " 310,000 euros" in parts


def test_protected_spans_win_over_the_budget_and_that_is_said() -> None:
    text = "See https://example.org/a?b=1 and https://example.org/c for more on this."
    terms = Terms(Protection.of("url"))
    with under(terms):
        kept = join(text, best_within(text, words(text), scored(words(text)), 2, tokenizer()))
    assert kept == " https://example.org/a?b=1 https://example.org/c"
    assert "the protected spans alone have" in terms.notes[0] and "more than the 2 asked for" in terms.notes[0]


def test_all_protected_is_returned_unchanged() -> None:
    text = ' {"a": [1, 2]}\n{"b": null}\n'
    terms = Terms(Protection.of("json"))
    with under(terms):
        assert join(text, best_within(text, words(text), scored(words(text)), 0.2, tokenizer())) == text
    assert terms.notes == ["all of the text is protected: it is returned unchanged"]


def test_spans_given_by_hand() -> None:
    text = "alpha beta gamma delta epsilon zeta eta theta"
    kept = best_within(text, words(text), [0] * 8, 0.3, tokenizer(), protect=[(11, 16)])
    assert " gamma" in join(text, kept)


def test_words_never_touch_where_something_was_left_out() -> None:
    text = "It is 5 km. Then we ate, drank;slept and (went)home."
    spans = words(text)
    pick = {text[a:b]: (a, b) for a, b in spans}

    def joined(*names: str) -> str:
        return join(text, bridges(text, [pick[name] for name in names]))

    assert joined(" drank", "slept") == " drank;slept"
    assert joined("It", " km") == "It km"
    assert join(text, bridges(text, [(5, 10), (12, 16)])) == " 5 km Then"
    assert joined(" (", "home") == " (home"
    assert joined("It", " km", ".", " Then") == "It km. Then"
    code = "Call `a` now (`b`), or `c`;`d`."
    assert join(code, bridges(code, [(4, 8), (14, 17)])) == " `a` `b`"
    assert join(code, bridges(code, [(14, 17), (18, 19)])) == "`b`,"
    assert join(code, bridges(code, [(14, 17), (27, 30)])) == "`b`), `d`"
    assert bridges("ab日cd", [(0, 2), (3, 5)]) == [(0, 2), (3, 5)]
    assert join("日本語", bridges("日本語", [(0, 1), (2, 3)])) == "日語"


@pytest.mark.slow
@pytest.mark.parametrize("split", ["words", "sentences"])
def test_two_hundred_thousand_tokens(split: str) -> None:
    text = document(100_000)
    assert count_tokens(tokenizer(), text) > 200_000
    units = SPLITTERS[split](text)
    start = time.perf_counter()
    kept = best_within(text, units, scored(units), 0.5, tokenizer())
    assert time.perf_counter() - start < 120
    target = int(count_tokens(tokenizer(), text) * 0.5 + 0.5)
    assert target - 60 <= size(text, kept) <= target
