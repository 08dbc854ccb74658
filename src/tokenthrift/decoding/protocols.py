"""What the parts of speculative decoding know of each other: drafters propose, the engine verifies and commits."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar, cast
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList

from ..core.draft import NOTHING, Draft

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """What one ``generate`` call asks for, for drafters that want to know.

    Attributes:
        model: the target.
        processors: what shapes the target's law; a sampled draft goes through them too.
        sample: whether tokens are drawn; else they are the likeliest.
        ends: end-of-sequence tokens.
        tokenizer: the target's, where the session knows it.
    """

    model: Any
    processors: LogitsProcessorList
    sample: bool
    ends: frozenset[int]
    tokenizer: Any = None

    def shared(self, key: Hashable, make: Callable[[], T]) -> T:
        """What requests of this model share under a key, for as long as the model lives; made for the first of them."""
        known = _shared.setdefault(self.model, {})
        if key not in known:
            known[key] = make()
        return cast("T", known[key])


_shared: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()


class Drafter(Protocol):
    """State of one sequence while it is generated. A batch has one drafter a row.

    It may also have ``observe(draft, logits)``, called before ``extend`` with what was verified and the model's logits
    ``(nodes + 1, vocabulary)`` at the last committed token and at every node, accepted or not.
    """

    def extend(self, tokens: Sequence[int]) -> None:
        """The model committed these tokens, in order."""

    def propose(self, limit: int) -> Draft | list[int]:
        """Guesses at what comes next, at most ``limit`` deep; a list is a chain, an empty one no guess."""


DrafterFactory: TypeAlias = Callable[[Sequence[int], Request], Drafter]
"""Makes the drafter of a new sequence from its prompt tokens: the ``start`` of most methods of the decode stage."""


class Drafters(Protocol):
    """The drafters of a whole batch, for methods that run a model of their own over all rows at once.

    They may also have ``attach(runner)``, called once after the prefill, for those that draft with the target itself.
    """

    def extend(self, tokens: Sequence[Sequence[int]]) -> None:
        """The tokens committed, row by row; none for rows that are done."""

    def propose(self, limits: Sequence[int | None]) -> list[Draft]:
        """Row by row, guesses at most so deep; an empty draft for rows whose limit is None, which are done."""

    def observe(self, drafts: Sequence[Draft | None], logits: Sequence[Tensor]) -> None:
        """What was verified, row by row, and the model's logits there; None for rows that are done."""


Start: TypeAlias = Callable[[Sequence[Sequence[int]], Request], Drafters]
"""Makes the drafters of a batch from its rows' prompt tokens: the ``start_batch`` of a method."""


class EachRow:
    """A drafter for every row."""

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        self.rows = list(drafters)

    def extend(self, tokens: Sequence[Sequence[int]]) -> None:
        for drafter, new in zip(self.rows, tokens, strict=True):
            if new:
                drafter.extend(new)

    def propose(self, limits: Sequence[int | None]) -> list[Draft]:
        drafts = []
        for drafter, limit in zip(self.rows, limits, strict=True):
            draft = NOTHING if limit is None or limit < 1 else drafter.propose(limit)
            drafts.append(draft if isinstance(draft, Draft) else Draft.chain(draft))
        return drafts

    def observe(self, drafts: Sequence[Draft | None], logits: Sequence[Tensor]) -> None:
        for drafter, draft, seen in zip(self.rows, drafts, logits, strict=True):
            if draft is not None and hasattr(drafter, "observe"):
                drafter.observe(draft, seen)


def each_row(factory: DrafterFactory) -> Start:
    """A batch of drafters that know nothing of each other."""
    return lambda prompts, request: EachRow([factory(prompt, request) for prompt in prompts])
