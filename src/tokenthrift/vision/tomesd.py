"""ToMe for Stable Diffusion: merge in front of a sub-layer, copy back behind it, so that no pixel goes missing."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.grid_matching import draw_cells, match_to, one_per_cell, patch_index


@method(
    "tomesd",
    stage="vision",
    paper="Token Merging for Fast Stable Diffusion",
    arxiv="2303.17604",
    needs=("features", "prefix", "grid"),
)
class ToMeSD:
    """Merge similar patches around the attention only, into one random patch of every cell; training-free.

    Each layer computes one matching from its input. A share ``ratio`` of the patches merges, each into the most similar
    destination; attention runs on the plain means, and every patch gets the result of its group. The stream keeps its
    length, so dense prediction and image generation work unchanged. Tokens of the prefix (CLS, registers) never merge.

    The authors' patch draws the destinations anew in every call; here a draw depends on ``seed``, layer and grid only,
    so the same image always gives the same output. They also turn the drawing off for batches of odd size, which in
    guided diffusion cannot be pairs; here the whole batch always shares one partition.

    Parameters:
        ratio: share of the patches to merge, in [0, 1); no more can go than are no destinations (3 in 4 with 2 x 2).
        sx, sy: width and height of a cell, in patches.
        use_rand: draw the destination in each cell; False takes the top left patch, which leaves a visible grid.
        seed: of the draws. They come from a generator of their own: the user's random numbers stay as they were.
        mlp: merge around the MLP too.

    Raises:
        ThriftError: a ``ratio`` outside [0, 1), cells without patches, or a negative seed.
    """

    placement: ClassVar[Literal["between", "boundary", "around"]] = "around"
    images_only: ClassVar[bool] = True

    ratio: float = 0.5
    sx: int = 2
    sy: int = 2
    use_rand: bool = True
    seed: int = 0
    mlp: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ThriftError(f"tomesd ratio={self.ratio!r} is not a share in [0, 1); 0.5 merges half of the patches")
        if self.sx < 1 or self.sy < 1:
            raise ThriftError(f"tomesd cells of {self.sx} x {self.sy} patches hold none; write sx=2, sy=2")
        if self.seed < 0:
            raise ThriftError(f"tomesd seed={self.seed!r} is negative; write seed=0")

    @property
    def on(self) -> tuple[str, ...]:
        """The sub-layers that run on merged tokens."""
        return ("attention", "mlp") if self.mlp else ("attention",)

    def reduce(self, view: View) -> TokenMap | None:
        """The merge around this layer's sub-layers; None where no patch is to merge."""
        frames, height, width = view.grid
        r = int(frames * height * width * self.ratio)
        if r <= 0:
            return None
        x, cell = view.features, (self.sy, self.sx)
        patches = patch_index(x.shape[1], view.grid, view.prefix).flatten()
        draw = draw_cells(frames, height, width, cell, self.seed + view.layer if self.use_rand else None)
        receives = torch.zeros(x.shape[1], dtype=torch.bool)
        receives[patches] = one_per_cell(draw, height, width, cell).flatten()
        protected = torch.ones(x.shape[1], dtype=torch.bool)
        protected[patches] = False
        groups = match_to(x, receives.to(x.device), r, protected.to(x.device))
        return None if groups is None else groups.map()
