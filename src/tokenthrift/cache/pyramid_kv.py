"""PyramidKV: SnapKV with much cache in the lower layers and little in the upper ones."""

from __future__ import annotations

import torch

from ..core.budget import Budget, Schedule
from ..core.errors import check_choice
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.attention import window_scores
from ..ops.topk import keep_top
from .repeated import check_every
from .snapkv import check_window


@method(
    "pyramid_kv",
    stage="cache",
    paper="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
    arxiv="2406.02069",
    needs=("keys", "attention", "mask", "seen", "layer", "layers"),
)
class PyramidKV:
    """Keep what :class:`~tokenthrift.cache.snapkv.SnapKV` would, with budgets that fall linearly over the layers.

    The budgets' mean over all layers is ``budget``. The last layer gets ``1/beta`` of it; more when the first layer
    would otherwise need more than the prompt before the window. Where the last layer cannot even hold the window, all
    layers get the same: then this is SnapKV, so keep ``budget`` above ``beta * window``. Reduced again, the budgets are
    those of a prompt as long as the text has become.

    With ``apart`` the budgets fall as in the authors' code: those without the window, rounded down, and the window on
    top; all layers get the same where that would be more than the first can use.

    Args:
        budget: mean entries per key/value head, the window included: a count, or a ratio in (0, 1] of the prompt.
        window: how many of the last queries vote.
        kernel: width of the pooling, odd; 1 switches it off.
        beta: steepness; 1 gives every layer the same.
        every: reduce again whenever so many tokens have come since; 0 reduces once, after the first forward.
        pooling: ``"mean"`` or ``"max"``.
        apart: whether the window is beside the budgets that fall, or part of them.
    """

    budget: int | float = 512
    window: int = 8
    kernel: int = 5
    beta: float = 20
    every: int = 0
    pooling: str = "mean"
    apart: bool = False

    def __post_init__(self) -> None:
        check_window("pyramid_kv", self.budget, self.window, self.kernel)
        Schedule.pyramid(self.beta)
        check_every("pyramid_kv", self.every, self.budget)
        check_choice("pyramid_kv", "pooling", self.pooling, ("mean", "max"))

    @property
    def lookback(self) -> int:
        """How many of the last queries are read when the cache is reduced again."""
        return self.window

    def budgets(self, n: int, layers: int) -> list[int]:
        """Entries that each of ``layers`` layers keeps of a prompt of ``n`` tokens."""
        mean = Budget.of(self.budget).tokens(n)
        if self.apart:
            older = mean - self.window
            if layers == 1 or not 0 < 2 * older <= n:
                return [mean] * layers
            first = min(2 * older - int(older // self.beta), n - self.window)
            step = 2 * (first - older) // (layers - 1)
            return [self.window + first - layer * step for layer in range(layers)]
        last = max(mean / self.beta, 2 * mean - (n - self.window))  # the first layer then gets 2 * mean - last
        if not self.window <= last <= mean:
            return [mean] * layers
        return Schedule.linear(last / mean - 1).spread(mean, layers)

    def reduce(self, view: View) -> TokenMap:
        batch, kv_heads, n, _ = view.keys.shape
        lengths = view.mask.sum(-1)
        shares = [self.budgets(int(k), view.layers)[view.layer] for k in view.seen]
        counts = torch.tensor(shares, device=lengths.device).minimum(lengths)
        if bool((counts == lengths).all()):
            return TokenMap.identity(n, (batch, kv_heads), view.keys.device)
        rows = view.attention(min(self.window, int(counts.max())))
        return keep_top(window_scores(rows, kv_heads, self.kernel, self.pooling), counts, view.mask)
