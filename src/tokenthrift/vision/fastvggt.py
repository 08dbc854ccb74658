"""FastVGGT: merge what many views share, inside the attention across views."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.grid_matching import draw_cells, match_to, one_per_cell, patch_index


@method(
    "fastvggt",
    stage="vision",
    paper="FastVGGT: Training-Free Acceleration of Visual Geometry Transformer",
    arxiv="2509.02560",
    needs=("features", "prefix", "grid", "layer"),
)
class FastVGGT:
    """Merge queries, keys and values of later views into the first view and a few anchors; training-free.

    The first view is the reference frame: all its tokens receive. In the other views the special tokens (camera,
    registers) and one random patch of every cell receive; the other patches merge, each into the most similar receiver
    of any view. The matching is computed from the attention's input, the merge is the plain mean of queries, keys and
    values after rotation, and every token gets the output of its group: the stream keeps its length.

    A share ``protect`` of all tokens, evenly spread, keeps its own query, key and value. Where such a token also
    receives, both it and its group take part in the attention, as in the authors' code.

    Similarities are compared in float32 (the authors': in bfloat16), and all rows of a batch are merged (theirs takes
    one scene at a time). A single view has nothing to merge: on encoders of one image this method does nothing.

    Parameters:
        ratio: share of all tokens to merge, in [0, 1); no more can go than give (with 0.9 all of those do).
        sx, sy: width and height of a cell, in patches.
        protect: share of the tokens that are protected, in [0, 1).
        start: first layer that merges.
        seed: of the draws, the same in every layer, from a generator of their own.

    Raises:
        ThriftError: shares outside [0, 1), cells without patches, a negative ``start`` or seed.
    """

    placement: ClassVar[Literal["between", "boundary", "around"]] = "around"
    on: ClassVar[tuple[str, ...]] = ("kernel",)

    ratio: float = 0.9
    sx: int = 2
    sy: int = 2
    protect: float = 0.1
    start: int = 0
    seed: int = 33

    def __post_init__(self) -> None:
        for name, share in (("ratio", self.ratio), ("protect", self.protect)):
            if not 0 <= share < 1:
                raise ThriftError(f"fastvggt {name}={share!r} is not a share in [0, 1); the paper's is ratio=0.9")
        if self.sx < 1 or self.sy < 1:
            raise ThriftError(f"fastvggt cells of {self.sx} x {self.sy} patches hold none; write sx=2, sy=2")
        for name, number in (("start", self.start), ("seed", self.seed)):
            if number < 0:
                raise ThriftError(f"fastvggt {name}={number!r} is negative; write {name}=0")

    def reduce(self, view: View) -> TokenMap | None:
        """The merge inside this layer's attention; None where no token is to merge."""
        x, (views, height, width) = view.features, view.grid
        tokens: int = x.shape[1]
        r = int(self.ratio * tokens)
        if r <= 0 or views < 2 or view.layer < self.start:
            return None
        patches = patch_index(tokens, view.grid, view.prefix)
        draw = draw_cells(views - 1, height, width, (self.sy, self.sx), self.seed)
        receives = torch.ones(tokens, dtype=torch.bool)  # the first view, and special tokens
        receives[patches[1:]] = one_per_cell(draw, height, width, (self.sy, self.sx))
        protected = evenly(tokens, int(self.protect * tokens))
        groups = match_to(x, receives.to(x.device), r, protected.to(x.device))
        if groups is None:
            return None
        return with_own_place(groups.map(), (receives & protected).nonzero().squeeze(-1).to(x.device))


def evenly(tokens: int, count: int) -> Tensor:
    """``count`` of the tokens, every so manieth: ``(tokens,)`` bool."""
    chosen = torch.zeros(tokens, dtype=torch.bool)
    if count:
        chosen[:: tokens // count] = True
        chosen[(tokens // count) * count :] = False
    return chosen


def with_own_place(map: TokenMap, tokens: Tensor) -> TokenMap:
    """A merging ``map`` that also gives each of ``tokens`` ``(n,)`` an output of its own, at the end.

    The token still counts in its group's mean, but its own output is where its mass goes, and what it gets back.
    """
    if not tokens.numel():
        return map
    own = tokens.expand(*map.lead, -1)
    places = torch.arange(map.n_out, map.n_out + tokens.numel(), device=tokens.device).expand_as(own)
    one = map.weight.new_ones(own.shape)
    return replace(
        map,
        source=torch.cat([map.source, own], -1),
        target=torch.cat([map.target, places], -1),
        weight=torch.cat([map.weight, one], -1),
        # a merge has one edge a token, in order: edge i is that of token i
        share=torch.cat([torch.ones_like(map.weight).scatter_(-1, own, 0), one], -1),
        anchor=torch.cat([map.anchors, own], -1),
        n_out=map.n_out + tokens.numel(),
    )
