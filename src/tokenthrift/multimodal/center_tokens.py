"""Central visual tokens: the baseline for photographs that have their subject in the middle."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.visual_grids import beside_segments, share_frames
from .parameters import check_positions


@method(
    "center_tokens",
    stage="connector",
    paper="A baseline",
    needs=("mask", "segments"),
)
class CenterTokens:
    """Keep the visual tokens nearest to the middle of each image, crop or frame.

    Distances are measured in shares of height and width, so that what is kept has the shape of the image; of tokens
    that are equally far, the earlier ones stay. Crops share the budget in proportion to their size, frames evenly.
    Tokens that separate rows of patches (newlines) stay, and are not counted.

    Args:
        keep: share of an image's visual tokens in (0, 1], or their number; at least one stays.
        positions: of the tokens that are left: ``"gapless"`` or ``"original"``.

    Raises:
        ThriftError: a ``keep`` that is no budget, or another policy of positions.
    """

    keep: float | int = 0.25
    positions: str = "gapless"

    def __post_init__(self) -> None:
        Budget.of(self.keep)
        check_positions("center_tokens", self.positions)

    def reduce(self, view: View) -> TokenMap:
        kept = beside_segments(view.segments, view.mask.shape[1])
        for segment, frame, count in share_frames(Budget.of(self.keep), view.segments):
            near = _from_middle(segment.h, segment.w).argsort(stable=True)
            kept[frame[near[:count]]] = True
        return TokenMap.keep(kept.to(view.mask.device).expand(view.mask.shape))


def _from_middle(h: int, w: int) -> Tensor:
    """``(h·w,)``: the larger of the distances to the middle row and the middle column."""
    down, across = (((torch.arange(n) + 0.5) / n - 0.5).abs() for n in (h, w))
    return torch.maximum(down[:, None], across).round(decimals=6).flatten()
