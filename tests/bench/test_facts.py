"""Questions made of real documents: each has one answer in its passage, and none tells it."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

from tokenthrift.bench.facts import KINDS, Passage, answered, fact_questions, normalised, questions
from tokenthrift.core.errors import ThriftError


def size(text: str) -> int:
    return len(text) // 4


@cache
def made(seed: int = 0) -> list[Passage]:
    return fact_questions(500, 160, size, seed, 5)


def test_every_answer_is_in_one_place_and_not_in_the_question() -> None:
    for passage in made():
        assert 100 <= size(passage.text) <= 160
        for question in passage.questions:
            answer = normalised(question.answer)
            assert f" {normalised(passage.text)} ".count(f" {answer} ") == 1
            assert not answered(question.text, question.answer)
            assert answered(passage.text, question.answer)


def test_there_are_500_of_every_kind_few_about_one_passage() -> None:
    counts = Counter(question.kind for passage in made() for question in passage.questions)
    assert sum(counts.values()) == 500 and all(counts[kind] >= 40 for kind in KINDS)
    assert max(len(passage.questions) for passage in made()) <= 5
    asked = [(passage.name, question.text) for passage in made() for question in passage.questions]
    assert len(set(asked)) == 500
    assert all(any(c.isdigit() for c in q.answer) == (q.kind == "number") for p in made() for q in p.questions)


def test_the_seed_decides() -> None:
    assert fact_questions(40, 160, size, 3) == fact_questions(40, 160, size, 3) != fact_questions(40, 160, size, 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A block is a piece of program text. It is a thing.", [("What is a block?", "piece of program text", "is")]),
        ("The call raises an overflow error, or not.", [("What does the call raise?", "overflow error", "does")]),
        ("Each frame contains the local names that", [("What does each frame contain?", "local names", "does")]),
        (
            "Changed in version 3.8: The parameter may be left out.",
            [("In which version was this changed: The parameter may be left out?", "3.8", "number")],
        ),
        (
            "heapq.nlargest(n, iterable)\nReturn the largest items of a data set.",
            [("What does heapq.nlargest return?", "largest items", "returns")],
        ),
        ("A pair is a pair. This is a test. If it is a test, fine.", []),  # the answer is in the question; no subject
        ("A key is a word. A lock takes a word.", []),  # the answer is there twice
    ],
)
def test_what_is_asked(text: str, expected: list[tuple[str, str, str]]) -> None:
    assert [tuple(question) for question in questions(text)] == expected


@pytest.mark.parametrize(
    ("text", "kept"),
    [("It is a PIECE of the program.", True), ("a piece (of program", True), ("piece program", False), ("", False)],
)
def test_whether_an_answer_is_there(text: str, kept: bool) -> None:
    assert answered(text, "piece of program") is kept
    assert not answered("13.12", "3.1") and answered("since 3.1.", "3.1")


def test_too_many_questions_are_refused() -> None:
    with pytest.raises(ThriftError, match="ask for fewer"):
        fact_questions(100_000, 160, size)
