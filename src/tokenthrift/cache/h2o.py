"""H2O: a few heavy hitters receive most of the attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.attention import attention_received, group_mean
from ..ops.topk import keep_top


@method(
    "h2o",
    stage="cache",
    paper="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    arxiv="2306.14048",
    needs=("keys", "queries", "scaling", "mask"),
    status="partial",
)
class H2O:
    """Keep the newest entries and, of the others, those that received most attention from all queries of the prompt.

    The sum over all queries costs as much as the layer's attention itself. Heads that share a key/value head decide
    together. Partial: the prompt is reduced; the paper goes on adding up attention and evicting while it decodes.

    Args:
        budget: entries to keep per key/value head: a count, or a ratio in (0, 1] of the prompt.
        recent: share of the budget, from 0 to 1, that the newest entries get.
        per_query: rank by the mean over the queries that could see an entry instead of the sum, which favours
            early tokens.
    """

    budget: int | float = 512
    recent: float = 0.5
    per_query: bool = False

    def __post_init__(self) -> None:
        Budget.of(self.budget)
        if not 0 <= self.recent <= 1:
            raise ThriftError(f"h2o needs 0 <= recent <= 1, the newest entries' share of the budget, got {self.recent}")

    def score(self, view: View) -> Tensor:
        """``(batch, kv_heads, tokens)``: attention received."""
        received = attention_received(view.queries, view.keys, view.scaling, view.mask)
        score = group_mean(received, view.keys.shape[1])
        return score / _age(view.mask)[:, None] if self.per_query else score

    def reduce(self, view: View) -> TokenMap:
        budget = Budget.of(self.budget)
        newest = torch.round(budget.tokens_of(view.mask.sum(-1)) * self.recent).to(view.mask.device)
        forced = _age(view.mask) <= newest[:, None]
        return keep_top(self.score(view).masked_fill(forced[:, None], float("inf")), budget, view.mask)


def _age(mask: Tensor) -> Tensor:
    """Real tokens from each token to the end, itself included: 1 for the newest."""
    return mask.flip(-1).cumsum(-1).flip(-1).clamp(min=1)
