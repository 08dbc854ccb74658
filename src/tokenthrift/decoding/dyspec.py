"""DySpec: a tree that grows where the draft model is sure."""

from __future__ import annotations

from heapq import heappop, heappush

from ..core.draft import ROOT
from ..core.errors import ThriftError
from ..core.method import method
from .from_model import FromModel
from .growing import Growth, Tree, pick


@method(
    "dyspec",
    stage="decode",
    paper="DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure",
    arxiv="2410.11744",
    status="partial",
)
class DySpec(FromModel):
    """Draft a tree of the guesses that a draft model thinks likeliest to be reached, each drawn once.

    A slot is a place for a further child of a node; its value is the probability, by the draft model, that
    verification gets there. The slot of the largest value is filled, again and again, which makes it two: one beside
    the new guess, one below it. Greedy decoding fills slots with the likeliest tokens; sampling draws them without
    replacement, and verifies by recursive rejection. Either way the output is the target's.

    Args:
        nodes: guesses at most.
        layered: fill, level by level, all slots of at least ``threshold``, so that the draft model is asked once a
            level, not once a guess. Greedy decoding then looks at the guess's own probability instead of the slot's.
        threshold: the least value then; None is one by ``nodes``.

    The other parameters: see :class:`~tokenthrift.decoding.from_model.FromModel`.

    Assumed: the algorithm follows an account of the paper, as no code of it was found. Trees that are not layered are
    checked against a reference made from that account; the layered variant and its threshold are our reading.

    Raises:
        ThriftError: a parameter outside its range, and as there.
    """

    nodes: int = 24
    layered: bool = True
    threshold: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(nodes=1)
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ThriftError(f"dyspec needs threshold above 0 and at most 1, not {self.threshold!r}")

    def grow(self, tree: Tree, limit: int) -> Growth:
        return self._layers(tree, limit) if self.layered else self._slots(tree, limit)

    def _slots(self, tree: Tree, limit: int) -> Growth:
        slots = [(-1.0, 0, ROOT)]  # value, when it was made, the node below which it is
        values, depths, children = {ROOT: 1.0}, {ROOT: 0}, {}
        while slots and len(tree) < self.nodes:
            value, _, node = heappop(slots)
            if node not in children:
                [law] = yield [node]
                children[node] = iter(pick(law, self.nodes, tree.sample)), law
            order, law = children[node]
            for token in order:
                [child] = tree.add(node, [token], law)
                values[child], depths[child] = values[node] * tree.said[child], depths[node] + 1
                heappush(slots, (value + values[child], 2 * child + 1, node))
                if depths[child] < limit and tree.chance(child) >= tree.worth:
                    heappush(slots, (-values[child], 2 * child + 2, child))
                break

    def _layers(self, tree: Tree, limit: int) -> Growth:
        threshold = 1 / self.nodes if self.threshold is None else self.threshold
        values, level = {ROOT: 1.0}, [ROOT]
        for _ in range(limit):
            laws = yield level
            first = len(tree)
            for node, law in zip(level, laws, strict=True):
                slot = values[node]
                for token in pick(law, self.nodes, tree.sample):
                    # What was drawn must not decide whether it is kept: then only the slot counts.
                    if (slot if tree.sample else values[node] * float(law[token])) < threshold:
                        break
                    if len(tree) == self.nodes:
                        return
                    [child] = tree.add(node, [token], law)
                    values[child] = values[node] * tree.said[child]
                    slot -= values[child]
            level = [n for n in range(first, len(tree)) if values[n] >= threshold and tree.chance(n) >= tree.worth]
            level.sort(key=lambda n: -values[n])
            if not level:
                return
