"""Long texts in passages that a model can read, made of whole units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..ops.tokens import Span, encode
from .spans import join, sentences


def passages(text: str, units: Sequence[Span], tokenizer: Any, limit: int) -> list[range]:
    """Consecutive units whose tokens are at most ``limit`` together, or one unit that has more.

    The passages of a text are about equally long: units go to as few passages as the limit allows, evenly.
    """
    sizes = [len(ids) for ids, _ in encode(tokenizer, [join(text, [unit]) for unit in units])]
    even = -(-sum(sizes) // max(-(-sum(sizes) // limit), 1))
    found: list[range] = []
    start = taken = 0
    for i, size in enumerate(sizes):
        # A passage ends where it is as long as the mean, or where the next unit does not fit.
        if i > start and (taken + size > limit or taken >= even):
            found.append(range(start, i))
            start, taken = i, 0
        taken += size
    return [*found, range(start, len(units))] if units else []


def pieces(text: str, units: Sequence[Span], tokenizer: Any, limit: int) -> list[range]:
    """The units of each sentence, cut between units where they are more than ``limit`` tokens.

    A unit that reaches over the end of a sentence belongs to the next one.
    """
    found: list[range] = []
    first = 0
    for end in [*(end for _, end in sentences(text)), len(text)]:
        last = first
        while last < len(units) and units[last][1] <= end:
            last += 1
        for part in passages(text, units[first:last], tokenizer, limit):
            found.append(range(first + part.start, first + part.stop))
        first = last
    return found


def span_of(units: Sequence[Span], part: range) -> Span:
    """From the first of these units to the last."""
    return units[part.start][0], units[part.stop - 1][1]
