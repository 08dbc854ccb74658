"""TOVA: the last token's attention decides, one choice for all heads of a layer."""

from __future__ import annotations

from torch import Tensor

from ..core.budget import Budget
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.topk import keep_top
from .repeated import check_every


@method(
    "tova",
    stage="cache",
    paper="Transformers are Multi-State RNNs",
    arxiv="2401.06104",
    needs=("keys", "attention", "mask"),
)
class TOVA:
    """Keep the entries that the last query attends to most, averaged over all heads of the layer.

    With ``every=1``, as in the paper, each new token's query drops the entry that it attends to least.

    Args:
        budget: entries to keep per layer: a count, or a ratio in (0, 1] of the prompt.
        keep_last: the last token always stays. The paper leaves it to its own score, nearly always high enough.
        every: reduce again whenever so many tokens have come since; 0 reduces once, after the first forward.
    """

    budget: int | float = 512
    keep_last: bool = True
    every: int = 0

    lookback = 1

    def __post_init__(self) -> None:
        Budget.of(self.budget)
        check_every("tova", self.every, self.budget)

    def score(self, view: View) -> Tensor:
        """``(batch, kv_heads, tokens)``, the same for all heads: mean attention, and 2 for a last token that stays."""
        shared = view.attention(1).mean(1)  # (batch, 1, tokens)
        if self.keep_last:
            shared[..., -1] = 2
        return shared.expand(-1, view.keys.shape[1], -1)

    def reduce(self, view: View) -> TokenMap:
        return keep_top(self.score(view), Budget.of(self.budget), view.mask)
