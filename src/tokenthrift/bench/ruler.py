"""Tasks like those of RULER (Hsieh et al., 2024, arXiv 2404.06654), made from a seed on real prose.

The kinds of task, the numbers of needles, hops and words, and the score are RULER's; the text and the wording are ours.
Keys and values are shorter than its UUIDs, and no solved example comes before a list.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from ..core.errors import ThriftError, did_you_mean
from .haystack import Haystack, Puzzle
from .questions import Questions
from .tasks import PLACES, Case

MEANING = {
    "single_needle": "one code hidden in the prompt is found",
    "multi_key": "one of four codes hidden in the prompt is found",
    "multi_value": "share found of four codes that belong to one name",
    "multi_query": "share found of the codes of four names",
    "key_value": "the value of one key is found in a long list of keys and values",
    "variables": "share found of five variables that got one value, four of them by a chain of assignments",
    "common_words": "share found of the ten words that a long list has most often",
    "frequent_words": "share found of the three made-up words that a text consists of most",
}
"""The tasks and what their scores mean: shares of the expected strings in what the model writes."""


@dataclass(frozen=True)
class RulerSuite(Questions):
    """Every task at every length. Answers are written freely, and scored by the share of strings recalled.

    Args:
        tasks: which of the tasks; all by default.
    """

    name: str = "ruler"
    lengths: tuple[int, ...] = (1024, 2048)
    samples: int = 2
    tasks: tuple[str, ...] = tuple(MEANING)

    note: ClassVar[str] = (
        "Tasks like RULER's, made from a seed on real text; not comparable with figures of RULER itself. Scores are "
        "the share of the expected strings in what greedy decoding writes."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for task in self.tasks:
            if task not in _TASKS:
                raise ThriftError(f"unknown task '{task}': {did_you_mean(task, _TASKS)}")
        if not self.tasks:
            raise ThriftError(f"there must be at least 1 task; there are {', '.join(_TASKS)}")

    def ask(self, haystack: Haystack, seed: int) -> Iterator[tuple[Case, int]]:
        for length in sorted(set(self.lengths)):
            for task in dict.fromkeys(self.tasks):
                for sample in range(self.samples):
                    rng = random.Random(f"{seed} {task} {sample}")
                    puzzle = _TASKS[task](rng, length, haystack.words)
                    id = f"{task}/{length}/{sample}"
                    facts = {"score": "recall", "cell": (task, str(length))}
                    later = self.question_later
                    yield haystack.case(id, task, puzzle, length, rng, later=later, **facts), length


# ---- needles in prose -----------------------------------------------------------------------------------------------


def _needles(rng: random.Random, keys: int) -> Puzzle:
    """So many codes of as many offices; the first one is asked for."""
    places, codes = rng.sample(PLACES, keys), _numbers(rng, keys)
    sentences = [f"The access code of the {p} office is {c}." for p, c in zip(places, codes, strict=True)]
    lead = f"The access code of the {places[0]} office is"
    question = f"\n\nQuestion: What is the access code of the {places[0]} office?\nAnswer: {lead}"
    return Puzzle(question, f" {codes[0]}", (codes[0],), _anywhere(rng, sentences))


def _multi_value(rng: random.Random) -> Puzzle:
    place, codes = rng.choice(PLACES), _numbers(rng, 4)
    hidden = _anywhere(rng, [f"One access code of the {place} office is {code}." for code in codes])
    question = (
        f"\n\nQuestion: What are the four access codes of the {place} office?\n"
        f"Answer: The four access codes of the {place} office are"
    )
    return Puzzle(question, _listed(codes), tuple(codes), hidden)


def _multi_query(rng: random.Random) -> Puzzle:
    places, codes = rng.sample(PLACES, 4), _numbers(rng, 4)
    sentences = [f"The access code of the {p} office is {c}." for p, c in zip(places, codes, strict=True)]
    names = _listed(places)
    question = (
        f"\n\nQuestion: What are the access codes of the offices{names}?\n"
        f"Answer: The access codes of the offices{names} are"
    )
    return Puzzle(question, _listed(codes), tuple(codes), _anywhere(rng, sentences))


def _variables(rng: random.Random) -> Puzzle:
    """One value and a chain of four assignments, in this order, among the prose."""
    names: list[str] = []
    while len(names) < 5:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        names += [name] * (name not in names)
    value = rng.randrange(10000, 100000)
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]
    question = (
        f"\n\nQuestion: Which five variables have the value {value}, as it was assigned in the text above?\n"
        f"Answer: The five variables with the value {value} are"
    )
    return Puzzle(question, _listed(names), tuple(names), _anywhere(rng, chain))


# ---- long lists -----------------------------------------------------------------------------------------------------


def _key_value(rng: random.Random, length: int) -> Puzzle:
    most = length // 4  # no tokenizer writes an entry in fewer tokens
    depth, (key, value), *others = (
        rng.random(),
        *([f"{rng.getrandbits(32):08x}" for _ in "kv"] for _ in range(most + 1)),
    )
    lines = [f'"{k}": "{v}",' for k, v in others]

    def entries(n: int) -> str:
        spot = round(depth * n)
        return "\n".join(["{", *lines[:spot], f'"{key}": "{value}",', *lines[spot:n], "}"])

    question = f'\n\nQuestion: Which value does the key "{key}" have above?\nAnswer: "{key}": "'
    return Puzzle(question, value, (value,), entries=entries, most=most)


def _common_words(rng: random.Random, length: int, words: Sequence[str]) -> Puzzle:
    """Ten words 30 times and others 3 times; in less than 4,096 tokens, as in RULER, 6 times and once."""
    often, seldom = (6, 1) if length < 4096 else (30, 3)
    shuffled = rng.sample(words, len(words))
    common, others, order = shuffled[:10], shuffled[10:], rng.random()

    def entries(n: int) -> str:
        listed = common * often + others[:n] * seldom
        random.Random(order).shuffle(listed)
        return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))

    question = (
        "\n\nQuestion: Which ten words does the numbered list have most often?\n"
        "Answer: The ten words that the numbered list has most often are: 1."
    )
    numbered = "".join(f" {i}. {word}" for i, word in enumerate(common, 1)).removeprefix(" 1.")
    return Puzzle(question, numbered, tuple(common), entries=entries, most=len(others))


def _frequent_words(rng: random.Random, length: int) -> Puzzle:
    """Made-up words as often as Zipf's law with the exponent 2 says; dots are the first, which is noise."""
    made = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(100)]
    made, order = ["....", *dict.fromkeys(made)], rng.random()

    def entries(n: int) -> str:
        # From 32 on, the last word that is asked for (rank 4) is always there more often than the next.
        text = [word for rank, word in enumerate(made, 1) for _ in range((n + 32) // rank**2)]
        random.Random(order).shuffle(text)
        return " ".join(text)

    question = (
        "\n\nQuestion: Which three made-up words does the coded text above have most often, dots aside?\n"
        "Answer: The three words that it has most often are"
    )
    return Puzzle(question, _listed(made[1:4]), tuple(made[1:4]), entries=entries, most=length)


_TASKS: dict[str, Callable[[random.Random, int, Sequence[str]], Puzzle]] = {
    "single_needle": lambda rng, length, words: _needles(rng, keys=1),
    "multi_key": lambda rng, length, words: _needles(rng, keys=4),
    "multi_value": lambda rng, length, words: _multi_value(rng),
    "multi_query": lambda rng, length, words: _multi_query(rng),
    "key_value": lambda rng, length, words: _key_value(rng, length),
    "variables": lambda rng, length, words: _variables(rng),
    "common_words": _common_words,
    "frequent_words": lambda rng, length, words: _frequent_words(rng, length),
}


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(n) for n in rng.sample(range(10**6, 10**7), count)]


def _anywhere(rng: random.Random, sentences: Sequence[str]) -> tuple[tuple[float, str], ...]:
    """The sentences in their order, at random depths."""
    depths = sorted(rng.uniform(0, 100) for _ in sentences)
    return tuple(zip(depths, sentences, strict=True))


def _listed(items: Sequence[str]) -> str:
    """' a, b, and c'."""
    return " " + ", ".join([*items[:-1], f"and {items[-1]}"])
