"""Sequoia: the static tree that is best for a draft model's acceptance rates."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.draft import ROOT
from ..core.errors import ThriftError
from ..core.method import method
from .from_model import FromModel
from .growing import Growth, Tree, pick
from .static_trees import best_tree, levels_of


@method(
    "sequoia",
    stage="decode",
    paper="Sequoia: Scalable and Robust Speculative Decoding",
    arxiv="2402.12374",
    status="partial",
)
class Sequoia(FromModel):
    """Draft a static tree whose shape brings the most tokens for given acceptance rates, drawn without replacement.

    The shape is found by dynamic programming. Children of a node are the likeliest tokens, or when sampling drawn
    without replacement, and verified by recursive rejection; the output is the target's.

    Args:
        nodes: guesses.
        depth: levels of them at most.
        rates: how often the first, second, ... child of a node is right, measured with draft model and text of yours.
        draft_time: time of one forward of the draft model, that of the target being 1.

    The other parameters: see :class:`~tokenthrift.decoding.from_model.FromModel`.

    The search, and the rule, are checked against the authors' code. Assumed: the default rates, which are no
    measurement of theirs; and verification takes as long for every tree of up to ``nodes`` guesses.

    Raises:
        ThriftError: a parameter outside its range, and as there.
    """

    nodes: int = 24
    depth: int = 6
    rates: Sequence[float] = (0.6, 0.15, 0.07, 0.04, 0.02, 0.01)
    draft_time: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(nodes=1, depth=1)
        if not isinstance(self.rates, Sequence) or not all(isinstance(r, int | float) for r in self.rates):
            raise ThriftError(f"sequoia needs rates as a list of numbers, [0.6, 0.2, 0.1], not {self.rates!r}")
        if self.draft_time < 0:
            raise ThriftError(f"sequoia needs draft_time of at least 0, not {self.draft_time!r}")
        object.__setattr__(self, "rates", tuple(map(float, self.rates)))
        self.shape()

    def shape(self) -> list[list[int]]:
        """Level by level, how many children each node has."""
        tree = best_tree(self.rates, {self.nodes + 1: 1.0}, depth=self.depth + 1, draft_time=self.draft_time)
        return levels_of(tree)

    def grow(self, tree: Tree, limit: int) -> Growth:
        level: list[int | None] = [ROOT]  # None where there is no guess, or none worth going on from
        for widths in self.shape()[:limit]:
            asked = [node for node, width in zip(level, widths, strict=True) if node is not None and width]
            if not asked:
                return
            laws = dict(zip(asked, (yield asked), strict=True))
            following: list[int | None] = []
            for node, width in zip(level, widths, strict=True):
                added: list[int] = []
                if node is not None and width:
                    added = tree.add(node, pick(laws[node], width, tree.sample), laws[node])
                following += [child if tree.chance(child) >= tree.worth else None for child in added]
                following += [None] * (width - len(added))
            level = following
