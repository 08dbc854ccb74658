"""SnapKV: the last queries of the prompt show which entries will be read."""

from __future__ import annotations

from torch import Tensor

from ..core.budget import Budget
from ..core.errors import ThriftError, check_choice
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.attention import window_scores
from ..ops.evicted import MERGES, merge_evicted
from ..ops.topk import keep_top
from .repeated import check_every


@method(
    "snapkv",
    stage="cache",
    paper="SnapKV: LLM Knows What You are Looking for Before Generation",
    arxiv="2404.14469",
    needs=("keys", "attention", "mask"),
)
class SnapKV:
    """Keep the entries that the last queries attend to most, and the window of these queries itself.

    Attention of the last ``window`` queries is averaged over the window and over the query heads that share a key/value
    head, and smoothed along the prompt by pooling, so that neighbours of an important token survive. The others are
    evicted, or merged into the kept ones.

    Args:
        budget: entries to keep per key/value head, the window included: a count, or a ratio in (0, 1] of the prompt.
        window: how many of the last queries vote. Shrinks when a ratio leaves less room than that.
        kernel: width of the pooling, odd; 1 switches it off.
        every: reduce again whenever so many tokens have come since; 0 reduces once, after the first forward.
        pooling: ``"mean"`` or ``"max"``.
        group: the ``"mean"`` of the query heads that share a key/value head, or their ``"max"``.
        merge: ``"weighted"``, ``"pivot"`` or ``"none"``; see :func:`~tokenthrift.ops.evicted.merge_evicted`.
    """

    budget: int | float = 512
    window: int = 32
    kernel: int = 5
    every: int = 0
    pooling: str = "mean"
    group: str = "mean"
    merge: str = "none"

    def __post_init__(self) -> None:
        check_window("snapkv", self.budget, self.window, self.kernel)
        for name, known in (("pooling", ("mean", "max")), ("group", ("mean", "max")), ("merge", ("none", *MERGES))):
            check_choice("snapkv", name, getattr(self, name), known)
        check_every("snapkv", self.every, self.budget)

    @property
    def lookback(self) -> int:
        """How many of the last queries are read when the cache is reduced again."""
        return self.window

    def score(self, view: View) -> Tensor:
        """``(batch, kv_heads, tokens)``: votes in [0, 1], the window above them."""
        window = min(self.window, Budget.of(self.budget).tokens(view.keys.shape[2]))
        return window_scores(view.attention(window), view.keys.shape[1], self.kernel, self.pooling, self.group)

    def reduce(self, view: View) -> TokenMap:
        batch, kv_heads, n, _ = view.keys.shape
        if Budget.of(self.budget).tokens(n) == n:
            return TokenMap.identity(n, (batch, kv_heads), view.keys.device)
        kept = keep_top(self.score(view), Budget.of(self.budget), view.mask)
        return kept if self.merge == "none" else merge_evicted(view.keys, kept, view.mask, self.merge)


def check_window(name: str, budget: int | float, window: int, kernel: int) -> None:
    """Refuse a window that does not fit into the budget, and a kernel without a middle."""
    count = Budget.of(budget).count
    if window < 1 or (count is not None and count <= window):
        raise ThriftError(f"{name} needs 1 <= window < budget, got window={window}, budget={budget}")
    if kernel < 1 or kernel % 2 == 0:
        raise ThriftError(f"{name} needs an odd kernel of at least 1, got {kernel}")
