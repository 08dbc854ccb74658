"""What the parts of speculative decoding know of each other: a drafter proposes, the engine verifies and commits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias


class Drafter(Protocol):
    """State of one sequence while it is generated. A batch has one drafter a row."""

    def extend(self, tokens: Sequence[int]) -> None:
        """The model committed these tokens, in order."""

    def propose(self, limit: int) -> list[int]:
        """At most ``limit`` guesses at the tokens that come next; none when there is nothing worth verifying."""


DrafterFactory: TypeAlias = Callable[[Sequence[int]], Drafter]
"""Makes the drafter of a new sequence from its prompt tokens: the ``start`` of every method of the decode stage."""
