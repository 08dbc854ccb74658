"""StreamingLLM: attention sinks and a recent window."""

from __future__ import annotations

import torch

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.topk import keep_top
from .repeated import check_every


@method(
    "streaming_llm",
    stage="cache",
    paper="Efficient Streaming Language Models with Attention Sinks",
    arxiv="2309.17453",
    needs=("keys", "mask"),
)
class StreamingLLM:
    """Keep the first tokens (attention sinks) and the most recent ones.

    Kept keys stay at their true positions; the paper's re-positioned variant matters only beyond the trained context.

    Args:
        budget: entries to keep per key/value head: a count, or a ratio in (0, 1] of the prompt.
        sinks: how many of them are the first tokens of the prompt.
        every: reduce again whenever so many tokens have come since; 0 reduces once, after the first forward.
    """

    budget: int | float = 512
    sinks: int = 4
    every: int = 0

    def __post_init__(self) -> None:
        count = Budget.of(self.budget).count
        if self.sinks < 0 or (count is not None and count <= self.sinks):
            raise ThriftError(f"streaming_llm needs 0 <= sinks < budget, got sinks={self.sinks}, budget={self.budget}")
        check_every("streaming_llm", self.every, self.budget)

    def reduce(self, view: View) -> TokenMap:
        batch, kv_heads, n, _ = view.keys.shape
        # Later is better, and the sinks are best; counting real tokens only, so that left padding is no sink.
        order = view.mask.cumsum(-1)
        score = torch.where(order <= self.sinks, torch.inf, order.to(torch.float32))
        return keep_top(score[:, None].expand(batch, kv_heads, n), Budget.of(self.budget), view.mask)
