"""Random visual tokens: the baseline that every other choice has to beat."""

from __future__ import annotations

import torch

from ..core.budget import Budget
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.topk import top_mask
from ..ops.visual import keep_all, keep_chosen, to_keep
from .parameters import check_positions


@method(
    "random_tokens",
    stage="connector",
    paper="A baseline",
    needs=("mask", "protected"),
)
class RandomTokens:
    """Keep visual tokens drawn uniformly without replacement, in their order.

    Tokens that separate rows of patches (newlines) stay, and are not counted.

    Args:
        keep: share of an image's visual tokens in (0, 1], or their number; at least one stays.
        seed: of the draw, the same for all images of so many tokens.
        positions: of the tokens that are left: ``"gapless"`` or ``"original"``.

    Raises:
        ThriftError: a ``keep`` that is no budget, or another policy of positions.
    """

    keep: float | int = 0.25
    seed: int = 0
    positions: str = "gapless"

    def __post_init__(self) -> None:
        Budget.of(self.keep)
        check_positions("random_tokens", self.positions)

    def reduce(self, view: View) -> TokenMap:
        wanted = to_keep(view, self.keep)
        if wanted is None:
            return keep_all(view)
        free, counts = wanted
        # Drawn on the CPU, so that every device keeps the same tokens.
        drawn = torch.rand(view.mask.shape[1], generator=torch.Generator().manual_seed(self.seed))
        scores = drawn.to(view.mask.device).expand(view.mask.shape)
        return keep_chosen(view, top_mask(scores, counts, free))
