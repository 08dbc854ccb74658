"""Drafts: guesses at the next tokens, as a tree that hangs on the last committed token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = -1
"""The node of the last committed token, which every draft hangs on. It is no guess, so it is not in the draft."""


class Drawn(NamedTuple):
    """What a node's children were drawn from.

    ``tokens`` in the order of drawing, repeats included; ``law`` ``(vocabulary,)`` float32, the draft's distribution
    after all that shapes it (temperature, top-p, ...), before the first draw.
    """

    tokens: Sequence[int]
    law: Tensor


@dataclass(frozen=True)
class Draft:
    """A tree of guesses. Parents come before their children, siblings in the order in which they are to be tried.

    Attributes:
        tokens: of the nodes.
        parents: index of each node's parent, :data:`ROOT` for those that follow the last committed token.
        chances: of each node, the estimated chance that it and all above it are accepted; None where nothing is known.
            No child has a larger one than its parent. What is not worth verifying is cut by them.
        sources: where each node's guess comes from, for the statistics; one name may stand for all.
        drawn: for nodes whose children were sampled, from what; see :mod:`tokenthrift.decoding.rules`. A draft with
            such laws is never cut: which guess would go depends on its token, and the law of the output with it.
    """

    tokens: Sequence[int] = ()
    parents: Sequence[int] = ()
    chances: Sequence[float] | None = None
    sources: Sequence[str] | str = "draft"
    drawn: Mapping[int, Drawn] = field(default_factory=dict)

    @classmethod
    def chain(cls, tokens: Sequence[int], chances: Sequence[float] | None = None, source: str = "draft") -> Draft:
        """One guess after the other."""
        return cls(tokens, range(ROOT, len(tokens) - 1), chances, source)

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def is_chain(self) -> bool:
        """Whether every node follows the one before it."""
        return all(parent == i - 1 for i, parent in enumerate(self.parents))

    @cached_property
    def depths(self) -> list[int]:
        """Of each node, the first level being 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths

    @cached_property
    def children(self) -> dict[int, dict[int, int]]:
        """Of each node that has some: its children's tokens, in order, with their nodes."""
        found: dict[int, dict[int, int]] = {}
        for node, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            found.setdefault(parent, {}).setdefault(token, node)
        return found

    def child(self, node: int, token: int) -> int | None:
        """The node that guesses ``token`` after ``node``."""
        return self.children.get(node, {}).get(token)

    def source(self, node: int) -> str:
        """Where a node comes from."""
        return self.sources if isinstance(self.sources, str) else self.sources[node]

    def ancestors(self) -> Tensor:
        """``(nodes + 1, nodes + 1)`` bool, true where the column is the row's node or above it; row 0 is the root."""
        n = len(self) + 1
        if self.is_chain:
            return torch.ones(n, n, dtype=torch.bool).tril_()
        seen = torch.eye(n, dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            seen[node + 1] |= seen[parent + 1]
        return seen

    def only(self, keep: Sequence[int]) -> Draft:
        """The draft with only these nodes, in this order; with every node, its parent must be there, before it."""
        if len(keep) == len(self):
            return self
        place = {ROOT: ROOT} | {node: i for i, node in enumerate(keep)}
        return Draft(
            [self.tokens[i] for i in keep],
            [place[self.parents[i]] for i in keep],
            None if self.chances is None else [self.chances[i] for i in keep],
            self.sources if isinstance(self.sources, str) else [self.sources[i] for i in keep],
            {place[i]: drawn for i, drawn in self.drawn.items() if i in place},
        )

    def within(self, limit: int, ends: set[int]) -> Draft:
        """No node deeper than ``limit``, and none after an end-of-sequence token."""
        if self.is_chain:
            end = next((i + 1 for i, token in enumerate(self.tokens[:limit]) if token in ends), limit)
            return self.only(range(min(end, len(self))))
        live = {ROOT}
        for node, (parent, depth) in enumerate(zip(self.parents, self.depths, strict=True)):
            if depth <= limit and parent in live and (parent == ROOT or self.tokens[parent] not in ends):
                live.add(node)
        return self.only(sorted(live - {ROOT}))

    def best_chain(self, limit: int) -> Draft:
        """The path of the highest chances (or of first children), at most ``limit`` long, for what takes no trees."""
        if self.is_chain:
            return self.only(range(min(limit, len(self))))
        path: list[int] = []
        node = ROOT
        while len(path) < limit and node in self.children:
            following = self.children[node].values()
            chances = self.chances
            node = next(iter(following)) if chances is None else max(following, key=chances.__getitem__)
            path.append(node)
        return self.only(path)


NOTHING = Draft()
"""No guess: a plain step."""
