"""Prompts of an exact length: something to find, hidden in real prose or among entries like it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..core.errors import ThriftError
from .data import Data
from .tasks import Case, Probe

_WORDS = 100
"""So many different words a text must have to be taken for prose."""
_SPARE = 16
"""Tokens that a list leaves to the prose before it: few, but enough to hit any length."""
_LONGEST = 32
"""More characters than any tokenizer's tokens have on average."""


@dataclass(frozen=True)
class Puzzle:
    """A question, its answer, and where the answer is to be found.

    ``question`` ends with the beginning of the answer, as in RULER: methods that look at the last queries see what is
    wanted, and a base model knows what to write. ``answer`` is the rest, which has all strings that are ``expected``.
    The context is prose with ``hidden`` sentences at depths in percent; or, with ``entries``, a list of ``entries(n)``,
    the larger the ``n`` (up to ``most``) the longer.
    """

    question: str
    answer: str
    expected: tuple[str, ...]
    hidden: tuple[tuple[float, str], ...] = ()
    entries: Callable[[int], str] | None = None
    most: int = 0


class Haystack:
    """Prose from the data's documents, and prompts made of it. Prose that is too short is repeated, as RULER's is."""

    def __init__(self, data: Data, tokenizer: Any) -> None:
        self.text = "\n\n".join(document.text.strip() for document in data.documents) + "\n\n"
        self.tokenizer = tokenizer
        if len(self.words) < _WORDS:
            raise ThriftError(
                f"the text has {len(self.words)} different words, too few to hide something in: give --data with text "
                f"or Markdown of {_WORDS} or more, or leave --data out"
            )

    @cached_property
    def words(self) -> list[str]:
        """Its plain words, in alphabetical order."""
        return sorted(set(re.findall(r"\b[a-z]{4,9}\b", self.text)))

    def prose(self, rng: random.Random) -> str:
        """All of it, beginning with a paragraph that is drawn."""
        start = rng.choice([0, *(m.end() for m in re.finditer(r"\n\n+", self.text))]) % len(self.text)
        return self.text[start:] + self.text[:start]

    def case(
        self, id: str, task: str, puzzle: Puzzle, length: int, rng: random.Random, *, later: bool, **facts: Any
    ) -> Case:
        """A case whose context and question have exactly ``length`` tokens.

        Args:
            later: the question comes when the prompt has been reduced already.
            facts: the rest of the case.

        Raises:
            ThriftError: there is no such prompt, since the length is too short.
        """
        asked = self._ids(puzzle.question)
        context = self._context(puzzle, length - asked, rng, f"{id}: a prompt of {length:,} tokens is too short")
        return Case(
            id,
            task,
            context,
            "" if later else puzzle.question,
            probes=(Probe(task, puzzle.question if later else "", puzzle.answer),),
            new_tokens=2 * self._ids(puzzle.answer) + 16,  # small models take detours
            expected=puzzle.expected,
            **facts,
        )

    def _context(self, puzzle: Puzzle, length: int, rng: random.Random, problem: str) -> str:
        prose, entries = self.prose(rng), puzzle.entries
        if entries is None:
            compose = lambda text: bury(text, puzzle.hidden)  # noqa: E731
        else:  # as many entries as fit, and before them some prose for what is left
            listed = entries(_most(lambda n: self._count(entries(n)) <= length - _SPARE, puzzle.most))
            compose = lambda text: f"{text}\n\n{listed}" if text else listed  # noqa: E731
        least = self._count(compose(""))
        if least > length:
            raise ThriftError(f"{problem}: what is to be found takes {least - length:,} more, give longer --lengths")
        for _ in range(64):
            text = prose * (1 + _LONGEST * length // len(prose))
            size = self._fit(compose, text, length)
            if size is not None:
                return compose(text[:size])
            # Where two tokens are cut off at once a length is skipped: elsewhere, a line further on, it is not.
            line = prose.find("\n") + 1 or 1
            prose = prose[line:] + prose[:line]
        raise ThriftError(f"{problem.split(':')[0]}: no text has exactly so many tokens here, give other --lengths")

    def _fit(self, compose: Callable[[str], str], text: str, length: int) -> int | None:
        return fit(lambda n: self._count(compose(text[:n])), length, len(text))

    def _count(self, context: str) -> int:
        """Tokens of a context; the model's own first token, where it has one, included."""
        return len(self.tokenizer(context, verbose=False)["input_ids"])

    def _ids(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def bury(prose: str, hidden: Sequence[tuple[float, str]]) -> str:
    """Prose with sentences at depths of 0 to 100 percent, each a line of its own between two lines or sentences."""
    ends = [0, *(m.end() for m in re.finditer(r"\n|[.!?] ", prose)), len(prose)]
    spots = [(min(ends, key=lambda end: abs(end - depth / 100 * len(prose))), text) for depth, text in hidden]
    pieces, done = [], 0
    for spot, text in sorted(spots, key=lambda found: found[0]):  # equal spots stay in the order given
        pieces += [prose[done:spot], f"\n{text}\n"]
        done = spot
    return "".join([*pieces, prose[done:]])


def fit(count: Callable[[int], int], length: int, most: int, around: int = 12) -> int | None:
    """A size up to ``most`` with ``count(size) == length``; None if none is found.

    The count grows with the size, if not everywhere.
    """
    low, low_count, high = 0, count(0), min(8 * length, most)
    if low_count == length:
        return low
    while (high_count := count(high)) < length:
        if high == most:
            return None
        low, low_count, high = high, high_count, min(2 * high, most)
    halve = False
    while high - low > 1:  # counts grow almost evenly: a straight line nearly hits, and halving makes sure of the rest
        share = 0.5 if halve else (length - low_count) / (high_count - low_count)
        size = min(max(low + round(share * (high - low)), low + 1), high - 1)
        found = count(size)
        if found == length:
            return size
        if found < length:
            low, low_count = size, found
        else:
            high, high_count = size, found
        halve = not halve
    return next((n for n in range(max(low - around, 0), high + around) if count(n) == length), None)


def _most(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that fits; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
