"""Uniformly spaced visual tokens: the baseline that knows nothing but where tokens lie."""

from __future__ import annotations

from torch import Tensor

from ..core.budget import Budget
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.visual_grids import beside_segments, cells, share_frames
from .parameters import check_positions


@method(
    "uniform_tokens",
    stage="connector",
    paper="A baseline",
    needs=("mask", "protected", "segments"),
)
class UniformTokens:
    """Keep visual tokens at equal distances: in raster order, or on the grid.

    In raster order these are the tokens number ``(i + 1/2) n / K`` of the ``n``, rounded down. On the grid, each crop
    or frame is divided into as many equal cells as it keeps tokens, and keeps the one in the middle of each; crops
    share the budget in proportion to their size, frames evenly. Tokens that separate rows of patches (newlines) stay,
    and are not counted.

    Args:
        keep: share of an image's visual tokens in (0, 1], or their number; at least one stays.
        grid: on the grid, and not in raster order.
        positions: of the tokens that are left: ``"gapless"`` or ``"original"``.

    Raises:
        ThriftError: a ``keep`` that is no budget, or another policy of positions.
    """

    keep: float | int = 0.25
    grid: bool = False
    positions: str = "gapless"

    def __post_init__(self) -> None:
        Budget.of(self.keep)
        check_positions("uniform_tokens", self.positions)

    def reduce(self, view: View) -> TokenMap:
        kept = self._on_grid(view) if self.grid else self._in_raster_order(view)
        return TokenMap.keep(kept.to(view.mask.device).expand(view.mask.shape))

    def _in_raster_order(self, view: View) -> Tensor:
        kept = view.protected[0].cpu()  # images of one layout have their newlines at the same places
        free = (~kept).nonzero().squeeze(-1)
        count, n = Budget.of(self.keep).tokens(len(free)), len(free)
        kept[free[[(2 * i + 1) * n // (2 * count) for i in range(count)]]] = True
        return kept

    def _on_grid(self, view: View) -> Tensor:
        kept = beside_segments(view.segments, view.mask.shape[1])
        for segment, frame, count in share_frames(Budget.of(self.keep), view.segments):
            if count:
                kept[frame[cells(segment.h, segment.w, count)[1]]] = True
        return kept
