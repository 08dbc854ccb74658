"""SpecTr: several drafts drawn independently, of which one is chosen by optimal transport."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import torch

from ..core.draft import ROOT
from ..core.method import method
from .from_model import FromModel
from .growing import Growth, Tree


@method(
    "spectr",
    stage="decode",
    paper="SpecTr: Fast Speculative Decoding via Optimal Transport",
    arxiv="2310.15141",
)
class SpecTr(FromModel):
    """Draw several drafts independently, and go on with one whose next token k-sequential selection accepts.

    The drafts make a tree; equal beginnings are verified once, but count as often as they were drawn. The law of the
    output is the target's. Greedy decoding has but one likeliest draft, a chain.

    Args:
        drafts: how many are drawn.
        depth: their length.

    The other parameters: see :class:`~tokenthrift.decoding.from_model.FromModel`.

    Raises:
        ThriftError: a parameter outside its range, and as there.
    """

    drafts: int = 4
    depth: int = 4

    rule: ClassVar[str] = "k_seq"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(drafts=1, depth=1)

    def grow(self, tree: Tree, limit: int) -> Growth:
        level = Counter({ROOT: self.drafts})  # how many drafts go through a node
        for _ in range(min(self.depth, limit)):
            laws = yield list(level)
            following: Counter[int] = Counter()
            for (node, count), law in zip(level.items(), laws, strict=True):
                if not law.any():
                    continue
                drawn = torch.multinomial(law, count, replacement=True) if tree.sample else law.argmax().expand(count)
                following.update(tree.add(node, drawn.tolist(), law))
            level = Counter({node: count for node, count in following.items() if tree.chance(node) >= tree.worth})
            if not level:
                return
