"""RSD: trees of guesses drawn without replacement, and verified recursively."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..core.draft import ROOT
from ..core.errors import ThriftError
from ..core.method import method
from .from_model import FromModel
from .growing import Growth, Tree, pick


@method(
    "rsd",
    stage="decode",
    paper="Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without Replacement",
    arxiv="2402.14160",
)
class RSD(FromModel):
    """Draft a tree by stochastic beam search, or with so many children a node, drawn without replacement.

    Children are tried in the order in which they were drawn; after a rejection the target's law loses the draft's, and
    the draft's law the guess. The law of the output is the target's. Greedy decoding drafts by plain beam search, or
    takes the likeliest children.

    Args:
        width: beams (RSD-S).
        depth: levels.
        branching: children of a node at each level (RSD-C), such as ``[3, 2, 1]``; then width and depth are not used.

    The other parameters: see :class:`~tokenthrift.decoding.from_model.FromModel`.

    Raises:
        ThriftError: a parameter outside its range, and as there.
    """

    width: int = 4
    depth: int = 4
    branching: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(width=1, depth=1)
        if self.branching is None:
            return
        wanted = self.branching if isinstance(self.branching, Sequence) else ()
        if not wanted or not all(isinstance(b, int) and not isinstance(b, bool) and b > 0 for b in wanted):
            raise ThriftError(f"rsd needs branching as whole numbers of at least 1, [3, 2, 1], not {self.branching!r}")
        object.__setattr__(self, "branching", tuple(wanted))

    def grow(self, tree: Tree, limit: int) -> Growth:
        return self._beams(tree, limit) if self.branching is None else self._constant(tree, limit)

    def _constant(self, tree: Tree, limit: int) -> Growth:
        level = [ROOT]
        for count in (self.branching or ())[:limit]:
            laws = yield level
            level = [
                child
                for node, law in zip(level, laws, strict=True)
                for child in tree.add(node, pick(law, count, tree.sample), law)
                if tree.chance(child) >= tree.worth
            ]
            if not level:
                return

    def _beams(self, tree: Tree, limit: int) -> Growth:
        beams = {ROOT: (0.0, 0.0)}  # log probability of the text to there, and the same perturbed
        for _ in range(min(self.depth, limit)):
            laws = yield list(beams)
            found: list[tuple[float, float, int, int]] = []  # perturbed, log probability, token, place of the beam
            for place, ((total, perturbed), law) in enumerate(zip(beams.values(), laws, strict=True)):
                totals = total + law.log()
                scores = _given_maximum(totals, perturbed) if tree.sample else totals
                top = scores.topk(min(self.width, len(law)))
                rows = (top.values.tolist(), totals[top.indices].tolist(), top.indices.tolist())
                found += [(*row, place) for row in zip(*rows, strict=True) if row[1] > -torch.inf]
            found.sort(key=lambda row: -row[0])
            nodes, beams = list(beams), {}
            for perturbed, total, token, place in found[: self.width]:
                [child] = tree.add(nodes[place], [token], laws[place])
                if tree.chance(child) >= tree.worth:
                    beams[child] = (total, perturbed)
            if not beams:
                return


def _given_maximum(totals: Tensor, maximum: float) -> Tensor:
    """Gumbel variables with these locations, given their largest: stochastic beam search (Kool et al., 2019).

    ``-log(exp(-maximum) - exp(-Z) + exp(-g))`` for free ones g with the largest Z, in a form that does not overflow.
    """
    free = totals - torch.empty_like(totals).exponential_().log()
    shifted = maximum - free + torch.log1p(-torch.exp(free - free.max()))
    return maximum - functional.relu(shifted) - torch.log1p(torch.exp(-shifted.abs()))
