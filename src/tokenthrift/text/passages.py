"""Long texts in passages that a model can read, made of whole units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..ops.tokens import Span, encode
from .spans import join


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
