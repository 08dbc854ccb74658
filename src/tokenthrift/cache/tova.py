"""TOVA: the last token's attention decides, one choice for all heads of a layer."""

from __future__ import annotations

from torch import Tensor

from ..core.budget import Budget
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.topk import keep_top


@method(
    "tova",
    stage="cache",
    paper="Transformers are Multi-State RNNs",
    arxiv="2401.06104",
    needs=("keys", "attention", "mask"),
    status="partial",
)
class TOVA:
    """Keep the entries that the prompt's last query attends to most, averaged over all heads of the layer.

    The last token itself always stays; the paper leaves it to its own score, which is high enough nearly always.
    Partial: the paper also drops an entry at every decoding step, here only the prompt is reduced.

    Args:
        budget: entries to keep per layer: a count, or a ratio in (0, 1] of the prompt.
    """

    budget: int | float = 512

    def __post_init__(self) -> None:
        Budget.of(self.budget)

    def score(self, view: View) -> Tensor:
        """``(batch, kv_heads, tokens)``, the same for all heads: mean attention, and 2 for the last token."""
        shared = view.attention(1).mean(1)  # (batch, 1, tokens)
        shared[..., -1] = 2
        return shared.expand(-1, view.keys.shape[1], -1)

    def reduce(self, view: View) -> TokenMap:
        return keep_top(self.score(view), Budget.of(self.budget), view.mask)
