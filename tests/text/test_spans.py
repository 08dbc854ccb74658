"""Words, phrases and sentences tile any text; what counts as one is shown by examples."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tokenthrift.ops.tokens import Span
from tokenthrift.text.spans import disjoint, join, map_to_spans, phrases, sentences, spans_to_map, words

SPLITTERS = [words, phrases, sentences]
TEXTS = st.text(st.sampled_from("aB1.,'\" \n-#!?。日\u0301🙂\u200d🇩```é\t"), max_size=60) | st.text(max_size=60)


def pieces(split: Callable[[str], list[Span]], text: str) -> list[str]:
    return [text[a:b] for a, b in split(text)]


@pytest.mark.parametrize("split", SPLITTERS)
@given(text=TEXTS)
@example(text="")
@example(text=" \n ")
def test_every_character_is_in_exactly_one_span(split: Callable[[str], list[Span]], text: str) -> None:
    assert "".join(pieces(split, text)) == text
    assert all(a < b for a, b in split(text))
    if text.strip():
        assert all(piece.strip() for piece in pieces(split, text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's 0.21, not 1,234.5%!", ["It's", " 0.21", ",", " not", " 1,234.5", "%", "!"]),
        ("see https://x.org/a?b=1&c=2 (v1.2.3)", ["see", " https://x.org/a?b=1&c=2", " (", "v1.2.3", ")"]),
        ("a_b/c.py --- x", ["a_b/c.py", " ---", " x"]),
        ("日本語です", ["日", "本", "語", "で", "す"]),
        ("हिन्दी ok", ["हिन्दी", " ok"]),
        ("👨‍👩‍👧👍🏽 🇩🇪🇫🇷", ["👨‍👩‍👧", "👍🏽", " 🇩🇪", "🇫🇷"]),
        ('{"id": 7}\n', ['{"', "id", '":', " 7", "}\n"]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    found = pieces(words, text)
    if text.startswith("{"):  # brackets and quotes are marks of their own
        expected = ["{", '"', "id", '"', ":", " 7", "}\n"]
    assert found == expected


def test_phrases_are_determiners_with_content_words() -> None:
    text = "The quick brown fox sat on the lazy dog. It did not cost $12.50.\nNew plans"
    assert pieces(phrases, text) == [
        *("The quick brown fox sat", " on", " the lazy dog", ".", " It", " did", " not", " cost", " $", "12.50", "."),
        "\nNew plans",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mr. Smith paid $12.50. Fine!", ["Mr. Smith paid $12.50. ", "Fine!"]),
        (
            "E.g. this, i.e. that. U.S. law. J. Doe et al. agree.",
            ["E.g. this, i.e. that. ", "U.S. law. ", "J. Doe et al. agree."],
        ),
        ("“Really?” he said. (Yes.) Then... no?! Ok", ["“Really?” he said. ", "(Yes.) ", "Then... no?! ", "Ok"]),
        ("A wrapped\nline. Next\n\nparagraph", ["A wrapped\nline. ", "Next\n\n", "paragraph"]),
        (
            "# Title\n- one. two\n- Two\n1. First\n2. Second",
            ["# Title\n", "- one. two\n", "- Two\n", "1. First\n", "2. Second"],
        ),
        ("| a | b |\n|---|---|\n| 1 | 2 |", ["| a | b |\n", "|---|---|\n", "| 1 | 2 |"]),
        ("Code:\n```py\nx = 1.\nY = 2\n```\nDone.", ["Code:\n", "```py\nx = 1.\nY = 2\n```\n", "Done."]),
        ("これは文です。次の「文。」です！終", ["これは文です。", "次の「文。」", "です！", "終"]),
        ("one\r\nTwo", ["one\r\n", "Two"]),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert pieces(sentences, text) == expected


@pytest.mark.parametrize("split", SPLITTERS)
@pytest.mark.parametrize(
    "text", [" ", "a", ".", "a.", "\n", '"', "日", "```\n", "1,", "Mr. ", "a-'", "!?", "\u200d", " \n"]
)
def test_time_is_linear_in_the_length(split: Callable[[str], list[Span]], text: str) -> None:
    start = time.perf_counter()
    split(text * (100_000 // len(text)) + "x")
    assert time.perf_counter() - start < 5


@given(st.lists(st.integers(0, 30), max_size=8, unique=True))
def test_maps_and_spans_are_two_ways_to_say_the_same(edges: list[int]) -> None:
    edges = sorted(edges)
    spans = list(zip(edges[::2], edges[1::2], strict=False))
    map = spans_to_map(spans, 30)
    assert map_to_spans(map) == spans
    assert (map.n_in, map.n_out) == (30, sum(b - a for a, b in spans))
    text = "abcdefghijklmnopqrstuvwxyzABCD"
    assert join(text, spans) == "".join(text[i] for ((i, _),) in map.provenance()[0])


def test_disjoint_joins_the_tokens_of_one_character() -> None:
    assert disjoint([(0, 0), (0, 2), (2, 4), (3, 4), (3, 4), (4, 8)]) == [(0, 2), (2, 4), (4, 8)]
