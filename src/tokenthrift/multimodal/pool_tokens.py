"""Average pooling of visual tokens on their grid: the baseline of all merging."""

from __future__ import annotations

import torch

from ..core.budget import Budget
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.visual_grids import beside_segments, cells, share_frames
from .parameters import check_positions


@method(
    "pool_tokens",
    stage="connector",
    paper="A baseline",
    needs=("mask", "segments"),
)
class PoolTokens:
    """Average the visual tokens in equal cells of each image, crop or frame.

    A grid is divided into exactly as many cells as it keeps tokens: bands of rows, each cut into equal parts. Where
    rows and columns divide evenly this is ordinary average pooling. A cell stands at the token in its middle. Crops
    share the budget in proportion to their size, frames evenly; a frame whose share is nothing is dropped. Tokens that
    separate rows of patches (newlines) stay, and are not counted.

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
        check_positions("pool_tokens", self.positions)

    def reduce(self, view: View) -> TokenMap:
        n, device, shape = view.mask.shape[1], view.mask.device, view.mask.shape[:1]
        beside = beside_segments(view.segments, n).nonzero().squeeze(-1)
        group, anchors, made = torch.full((n,), -1), [beside], len(beside)
        group[beside] = torch.arange(made)
        for segment, frame, count in share_frames(Budget.of(self.keep), view.segments):
            if count:
                cell, middle = cells(segment.h, segment.w, count)
                group[frame] = cell + made
                anchors.append(frame[middle])
                made += count
        if made == n:
            return TokenMap.identity(n, shape, device)
        anchor = torch.cat(anchors).to(device).expand(*shape, -1)
        return TokenMap.merge(group.to(device).expand(*shape, -1), made, anchor=anchor)
