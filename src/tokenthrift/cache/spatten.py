"""SpAtten: what the attention of all queries adds up to says which entries matter, between the first and the newest."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.topk import keep_top
from .repeated import check_every


@method(
    "spatten",
    stage="cache",
    paper="SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning",
    arxiv="2012.09852",
    needs=("received", "mask"),
)
class SpAtten:
    """Keep the first entries, the newest, and between these the ones that got most attention from all queries so far.

    This is the token pruning of the authors' SpAtten-LLM, where each key/value head of a layer chooses for itself; the
    query heads that share one decide together. Compared with the authors' code is which entries stay, given the
    attention. Their chat program gives it the scaled products of the last forward, before the softmax; here, as in the
    paper, it gets the probabilities, of all queries. It also gives the kept keys consecutive positions; here they stay
    at their true ones. The pruning from layer to layer, of tokens and of heads, is ``prefill=spatten_cascade``.

    Args:
        budget: entries to keep per key/value head: a count, or a ratio in (0, 1] of the prompt.
        sinks: how many of the first tokens stay.
        recent: share of the budget, from 0 to 1, that the newest entries get; the sinks come first.
        every: reduce again whenever so many tokens have come since; 0 reduces once, after the first forward.

    Raises:
        ThriftError: parameters outside these ranges.
    """

    budget: int | float = 512
    sinks: int = 4
    recent: float = 0.5
    every: int = 0

    def __post_init__(self) -> None:
        count = Budget.of(self.budget).count
        if self.sinks < 0 or (count is not None and count <= self.sinks):
            raise ThriftError(f"spatten needs 0 <= sinks < budget, got sinks={self.sinks}, budget={self.budget}")
        if not 0 <= self.recent <= 1:
            raise ThriftError(
                f"spatten needs 0 <= recent <= 1, the newest entries' share of the budget, got {self.recent}"
            )
        check_every("spatten", self.every, self.budget)

    def reduce(self, view: View) -> TokenMap:
        mask: Tensor = view.mask
        counts = Budget.of(self.budget).tokens_of(mask.sum(-1))
        newest = torch.minimum(torch.round(counts * self.recent), (counts - self.sinks).clamp(min=0))
        from_the_start, to_the_end = mask.cumsum(-1), mask.flip(-1).cumsum(-1).flip(-1)
        forced = (from_the_start <= self.sinks) | (to_the_end <= newest[:, None])
        return keep_top(view.received.masked_fill(forced[:, None], torch.inf), counts, mask)
