"""KNorm: keys of small norm attract attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.topk import keep_top
from .repeated import check_every


@method(
    "knorm",
    stage="cache",
    paper="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
    arxiv="2406.11430",
    needs=("keys", "mask"),
)
class KNorm:
    """Keep the entries whose keys have the smallest L2 norm, per head.

    Norms are taken in float32: in bfloat16 most of them tie.

    Args:
        budget: entries to keep per key/value head: a count, or a ratio in (0, 1] of the prompt.
        every: reduce again whenever so many tokens have come since; 0 reduces once, after the first forward.
    """

    budget: int | float = 512
    every: int = 0

    def __post_init__(self) -> None:
        Budget.of(self.budget)
        check_every("knorm", self.every, self.budget)

    def score(self, view: View) -> Tensor:
        """``(batch, kv_heads, tokens)``: minus the norm."""
        return -torch.linalg.vector_norm(view.keys, dim=-1, dtype=torch.float32)

    def reduce(self, view: View) -> TokenMap:
        return keep_top(self.score(view), Budget.of(self.budget), view.mask)
