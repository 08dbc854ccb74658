"""KeyDiff: keys unlike the others matter."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from ..core.budget import Budget
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.topk import keep_top
from .repeated import check_every


@method(
    "keydiff",
    stage="cache",
    paper="KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained "
    "Environments",
    arxiv="2504.15364",
    needs=("keys", "mask"),
)
class KeyDiff:
    """Keep the entries whose keys point away from the mean direction of all keys, per head.

    No attention is needed, so it costs next to nothing. The paper reads a long prompt block by block and evicts after
    each: that is ``every`` with chunked prefill (``prefill_chunk_size``); else the whole prompt is judged at once.

    Args:
        budget: entries to keep per key/value head: a count, or a ratio in (0, 1] of the prompt.
        every: reduce again whenever so many tokens have come since; 0 reduces once, after the first forward.
    """

    budget: int | float = 512
    every: int = 0

    def __post_init__(self) -> None:
        Budget.of(self.budget)
        check_every("keydiff", self.every, self.budget)

    def score(self, view: View) -> Tensor:
        """``(batch, kv_heads, tokens)``: minus the cosine between a key and the mean of the normalised real keys."""
        keys = view.keys.to(torch.float32)
        anchor = (normalize(keys, dim=-1) * view.mask[:, None, :, None]).sum(-2, keepdim=True)  # a cosine needs no mean
        return -cosine_similarity(keys, anchor, dim=-1)

    def reduce(self, view: View) -> TokenMap:
        return keep_top(self.score(view), Budget.of(self.budget), view.mask)
