"""LagKV: a token is judged against the tokens that follow it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.rows import score_rows
from ..ops.topk import keep_top
from .repeated import check_every


@method(
    "lagkv",
    stage="cache",
    paper="LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important",
    arxiv="2504.04704",
    needs=("keys", "values", "mask"),
)
class LagKV:
    """Keep, of every partition of the prompt, the entries that stand out against the next partition, per head.

    The prompt after the sinks is cut into partitions of ``lag`` tokens. A partition's keys and values are scaled by the
    range of the next partition's; those that vary most over their channels rank first. Sinks, the last complete
    partition and what follows it have no judge and outrank the others; a prompt of only these keeps the newest.
    Partitions share the budget equally, a remainder goes to the later ones. Reduced again, the entries that are left
    are cut into partitions anew.

    Args:
        budget: entries to keep per key/value head: a count, or a ratio in (0, 1] of the prompt.
        sinks: how many of the first tokens stay.
        lag: tokens in a partition.
        every: reduce again whenever so many tokens have come since; 0 reduces once, after the first forward.
    """

    budget: int | float = 512
    sinks: int = 4
    lag: int = 128
    every: int = 0

    def __post_init__(self) -> None:
        count = Budget.of(self.budget).count
        if self.sinks < 0 or (count is not None and count <= self.sinks):
            raise ThriftError(f"lagkv needs 0 <= sinks < budget, got sinks={self.sinks}, budget={self.budget}")
        if self.lag < 2:
            raise ThriftError(f"lagkv needs a lag of at least 2 tokens, got {self.lag}")
        check_every("lagkv", self.every, self.budget)

    def score(self, view: View) -> Tensor:
        """``(batch, kv_heads, tokens)``: ranks within the partitions from 0 to ``lag``, the last tokens above them."""
        return score_rows(self._ranks, view.mask, view.keys.to(torch.float32), view.values.to(torch.float32))

    def reduce(self, view: View) -> TokenMap:
        return keep_top(self.score(view), Budget.of(self.budget), view.mask)

    def _ranks(self, keys: Tensor, values: Tensor) -> Tensor:
        n = keys.shape[-2]
        judged = max((n - self.sinks) // self.lag - 1, 0)  # partitions that have a complete one after them
        out = torch.arange(self.lag, self.lag + n, device=keys.device, dtype=torch.float32)
        out = out.expand(keys.shape[:-1]).clone()
        out[..., : self.sinks] = float("inf")
        if judged:
            end = self.sinks + judged * self.lag
            key_score, value_score = (
                _standing_out(t[..., self.sinks : end + self.lag, :].unflatten(-2, (judged + 1, self.lag)))
                for t in (keys, values)
            )
            rank = (key_score + value_score).argsort(-1).argsort(-1)
            later = torch.arange(judged, device=keys.device).unsqueeze(-1) / judged  # parts equal ranks
            out[..., self.sinks : end] = (rank + later).flatten(-2)
        return out


def _standing_out(parts: Tensor) -> Tensor:
    """``(…, partitions, lag, dim)`` to ``(…, partitions - 1, lag)``: how unlike the next partition each token is."""
    low, high = parts.amin(-2, keepdim=True), parts.amax(-2, keepdim=True)
    low, high = low[..., 1:, :, :], high[..., 1:, :, :]
    scaled = (parts[..., :-1, :, :] - low) / (high - low).clamp(min=1e-6)
    return scaled.std(-1).softmax(-1)
