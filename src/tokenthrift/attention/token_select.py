"""TokenSelect: all heads of a layer vote on the tokens that they read together."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.view import View
from ..ops.gathered import span
from ..ops.topk import top_entries


@method(
    "token_select",
    stage="attention",
    paper="TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level "
    "KV Cache Selection",
    arxiv="2411.02886",
    needs=("queries", "keys", "mask", "memory"),
    status="partial",
)
class TokenSelect:
    """Read the first tokens, the newest, and of those between the ones that win a soft vote of all heads.

    Each query head gives a vote of one, split by the softmax of its products with the keys between; the tokens with the
    most votes are read by all heads of the layer. While a layer's query stays similar to that of the last vote, the
    result of that vote is used again. Partial: keys and queries are compared at their true positions, where the authors
    put all tokens at one distance so as to reach beyond the trained context, and prefill is dense.

    Args:
        budget: entries to read per head in all; the authors read 2,688: 128 first, 512 newest, 2,048 by vote.
        sinks: how many of them are the first tokens.
        local: how many are the newest.
        similarity: vote again when the cosine between the queries is below this; above 1, vote at every step. The
            authors' code has 0.9, for queries that are all turned to one position; at their true ones they are less
            alike. On smollm2-135m 0.9 uses one vote in ten again, 0.8 every second one.
    """

    budget: int = 512
    sinks: int = 16
    local: int = 96
    similarity: float = 0.8

    def __post_init__(self) -> None:
        Budget.of(self.budget)
        if self.sinks < 0 or self.local < 1 or self.sinks + self.local >= self.budget:
            raise ThriftError(
                f"token_select needs sinks >= 0, local >= 1 and sinks + local < budget, got sinks={self.sinks}, "
                f"local={self.local}, budget={self.budget}"
            )
        if not self.similarity >= -1:
            raise ThriftError(f"token_select needs a similarity of at least -1, a cosine, got {self.similarity}")

    def select(self, view: View) -> Tensor | None:
        batch, kv_heads, n, _ = view.keys.shape
        if n <= self.budget:
            return None
        voted, newest = self._voted(view), span(n - self.local, n, view.keys.device)
        if view.mask is None:
            chosen = torch.cat([voted, newest.expand(batch, -1)], dim=-1)
        else:  # a short row has been voted out of candidates: it reads each of its tokens once
            score = self._fixed(view.mask).to(torch.float32).scatter_(-1, voted, 1.0) + view.mask
            chosen = score.topk(self.budget, sorted=False).indices
        return chosen.unsqueeze(1).expand(-1, kv_heads, -1)

    def _voted(self, view: View) -> Tensor:
        """``(batch, budget - local)``: the first tokens and those voted for, by a new vote in rows that need one."""
        asked = view.queries.flatten(1).to(torch.float32)
        last: tuple[Tensor, Tensor] | None = view.memory.get("vote")
        moved = [True] if last is None else (cosine_similarity(asked, last[0]) < self.similarity).tolist()
        if last is None or all(moved):
            last = asked, self._vote(view)
        elif any(moved):
            rows = torch.tensor(moved, device=asked.device).unsqueeze(-1)
            last = torch.where(rows, asked, last[0]), torch.where(rows, self._vote(view), last[1])
        view.memory["vote"] = last
        return last[1]

    def _vote(self, view: View) -> Tensor:
        batch, kv_heads, n, dim = view.keys.shape
        between = view.keys[:, :, self.sinks : n - self.local]
        # As the authors do, without the factor of attention: sharper votes.
        logits = (view.queries.reshape(batch, kv_heads, -1, dim) @ between.mT).to(torch.float32)
        candidates = None
        if view.mask is not None:
            candidates = (view.mask & ~self._fixed(view.mask))[:, self.sinks : n - self.local]
            logits = logits.masked_fill(~candidates[:, None, None], torch.finfo(torch.float32).min)
        votes = logits.softmax(-1).sum((1, 2), keepdim=True).squeeze(1)
        winners = top_entries(votes, self.budget - self.sinks - self.local, candidates).squeeze(1) + self.sinks
        return torch.cat([span(0, self.sinks, winners.device).expand(batch, -1), winners], dim=-1)

    def _fixed(self, mask: Tensor) -> Tensor:
        """``(batch, n)``: the first real tokens and the newest."""
        fixed = mask & (mask.cumsum(-1) <= self.sinks)
        fixed[:, mask.shape[-1] - self.local :] = True
        return fixed
