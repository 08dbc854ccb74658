"""H2O: a few heavy hitters receive most of the attention."""

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
    "h2o",
    stage="cache",
    paper="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    arxiv="2306.14048",
    needs=("received", "asked", "mask"),
)
class H2O:
    """Keep the newest entries and, of the others, those that received most attention from all queries so far.

    The sum over all queries costs as much as the layer's attention itself. Heads that share a key/value head decide
    together. With ``every=1``, as in the paper, sums go on while decoding and each new token evicts an entry.

    Args:
        budget: entries to keep per key/value head: a count, or a ratio in (0, 1] of the prompt.
        recent: share of the budget, from 0 to 1, that the newest entries get.
        per_query: rank by the mean over the queries that could see an entry instead of the sum, which favours
            early tokens.
        every: reduce again whenever so many tokens have come since; 0 reduces once, after the first forward.
    """

    budget: int | float = 512
    recent: float = 0.5
    per_query: bool = False
    every: int = 0

    def __post_init__(self) -> None:
        Budget.of(self.budget)
        if not 0 <= self.recent <= 1:
            raise ThriftError(f"h2o needs 0 <= recent <= 1, the newest entries' share of the budget, got {self.recent}")
        check_every("h2o", self.every, self.budget)

    def score(self, view: View) -> Tensor:
        """``(batch, kv_heads, tokens)``: attention received."""
        received: Tensor = view.received
        return received / view.asked if self.per_query else received

    def reduce(self, view: View) -> TokenMap:
        budget = Budget.of(self.budget)
        newest = torch.round(budget.tokens_of(view.mask.sum(-1)) * self.recent).to(view.mask.device)
        to_the_end = view.mask.flip(-1).cumsum(-1).flip(-1)  # entries from each one on, itself included
        forced = to_the_end <= newest[:, None]
        return keep_top(self.score(view).masked_fill(forced[:, None], float("inf")), budget, view.mask)
