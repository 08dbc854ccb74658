"""Expected attention: what queries that are yet to come will probably read."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.attention import group_mean
from ..ops.topk import keep_top
from .repeated import check_every


@method(
    "expected_attention",
    stage="cache",
    paper="Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
    arxiv="2510.00636",
    needs=("keys", "values", "queries", "rotary", "scaling", "mask", "seen"),
)
class ExpectedAttention:
    """Keep the entries that a Gaussian of future queries would read most, weighted by the length of their values.

    Mean and covariance of the prompt's queries before their rotation are rotated as the next ``future`` positions will
    be on average; a key's weight is then the closed form of the mean of ``exp(q·k)``. Reduced again, the statistics are
    those of the last ``recent`` queries, and the positions go on from the text's end.

    Args:
        budget: entries to keep per key/value head: a count, or a ratio in (0, 1] of the prompt.
        sinks: how many of the first tokens stay; their outlying queries are left out of the statistics.
        future: positions ahead to average over.
        covariance: use the covariance of the queries, not only their mean.
        value_norm: weight by the norm of the values.
        epsilon: added to the expected attention before that weight, so that long values stay in play.
        recent: how many queries the statistics are of when the cache is reduced again.
        every: reduce again whenever so many tokens have come since; 0 reduces once, after the first forward.
    """

    budget: int | float = 512
    sinks: int = 4
    future: int = 512
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0
    recent: int = 256
    every: int = 0

    def __post_init__(self) -> None:
        count = Budget.of(self.budget).count
        if self.sinks < 0 or (count is not None and count <= self.sinks):
            raise ThriftError(
                f"expected_attention needs 0 <= sinks < budget, got sinks={self.sinks}, budget={self.budget}"
            )
        if self.future < 1:
            raise ThriftError(f"expected_attention needs at least 1 future position, got {self.future}")
        if not 0 <= self.epsilon < float("inf"):
            raise ThriftError(f"expected_attention needs a finite epsilon of at least 0, got {self.epsilon}")
        if self.recent < 2:
            raise ThriftError(f"expected_attention needs at least 2 recent queries to go on from, got {self.recent}")
        check_every("expected_attention", self.every, self.budget)

    @property
    def lookback(self) -> int:
        """How many of the last queries are read when the cache is reduced again."""
        return self.recent

    def score(self, view: View) -> Tensor:
        """``(batch, kv_heads, tokens)``: expected attention times value norm, infinite for sinks."""
        counted = view.mask & (view.mask.cumsum(-1) > self.sinks)
        logits = self._expected_logits(view)
        attention = logits.masked_fill(~counted[:, None], torch.finfo(logits.dtype).min).softmax(-1)
        score = group_mean(attention, view.keys.shape[1])
        if self.value_norm:
            score = (score + self.epsilon) * torch.linalg.vector_norm(view.values, dim=-1, dtype=torch.float32)
        return score.masked_fill(~counted[:, None], float("inf"))

    def reduce(self, view: View) -> TokenMap:
        return keep_top(self.score(view), Budget.of(self.budget), view.mask)

    def _expected_logits(self, view: View) -> Tensor:
        """``(batch, heads, tokens)``: log of the expected ``exp(q·k)``, of each query head over the keys it reads."""
        asked = view.queries.shape[-2]
        place = view.seen[:, None] - asked + torch.arange(asked, device=view.seen.device)  # of the queries, in the text
        counted = place >= self.sinks
        share = (counted / counted.sum(-1, keepdim=True).clamp(min=1))[:, None, :, None]
        ahead = view.rotary.ahead(self.future, place >= 0)
        queries = view.rotary.undo(view.queries.to(torch.float32))
        keys = view.keys.to(torch.float32).repeat_interleave(queries.shape[1] // view.keys.shape[1], dim=1)
        mean = (queries * share).sum(-2, keepdim=True)
        logits = (ahead.apply(mean) @ keys.mT).squeeze(-2) * view.scaling
        if self.covariance:
            centred = queries - mean
            spread = (centred * share).mT @ centred
            spread = ahead.apply(ahead.apply(spread).mT)  # rows, then columns: R C Rᵀ
            logits += ((keys @ spread) * keys).sum(-1) * view.scaling**2 / 2
        return logits
