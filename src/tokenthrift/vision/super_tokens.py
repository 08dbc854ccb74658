"""Super token attention: attend between soft local clusters of patches instead of between all patches."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.grid_matching import patch_index
from ..ops.stages import check_iterations
from ..ops.super_tokens import associate, association_map, pad_to_cells, spread, super_tokens


@method(
    "super_tokens",
    stage="vision",
    paper="Vision Transformer with Super Token Sampling",
    arxiv="2211.11167",
    needs=("features", "prefix", "grid"),
    status="partial",
)
class SuperTokens:
    """Run the attention of every layer on super tokens: soft means over cells of patches and their neighbours.

    Every patch divides itself between the super tokens of its own cell and the eight around it; prefix tokens and super
    tokens attend to each other; every patch gets back the mix that it gave to. The stream keeps its length.

    Partial: the paper trains a model of its own (:class:`SuperTokenAttention` is its layer, checked against the
    authors' code). Using the sampling on an encoder that was trained without it is ours, and so are: patches are
    compared after normalising them like a LayerNorm without weights (as the paper's attention input is normalised);
    neighbours outside the image take no part of a patch, so that no mass is lost; padding is not averaged in.

    Parameters:
        cell: height and width of a cell, in patches; (1, 1) changes nothing.
        iterations: rounds of assigning patches and averaging.

    Raises:
        ThriftError: a ``cell`` that is no pair of positive numbers, or no iterations.
    """

    placement: ClassVar[Literal["between", "boundary", "around"]] = "around"
    images_only: ClassVar[bool] = True
    on: ClassVar[tuple[str, ...]] = ("attention",)

    cell: tuple[int, int] = (2, 2)
    iterations: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "cell", checked_cell(self.cell, "super_tokens"))
        check_iterations("super_tokens", self.iterations, least=1, usual=1)

    def reduce(self, view: View) -> TokenMap | None:
        """The association of this layer's input."""
        if self.cell == (1, 1):
            return None
        x, (frames, height, width) = view.features, view.grid
        patches = patch_index(x.shape[1], view.grid, view.prefix)
        if view.prefix and frames > 1 and int(patches[1, 0] - patches[0, -1]) > 1:
            raise ThriftError("super_tokens works on one sequence of patches, not on frames with a prefix each")
        map = layer_norm(x[:, patches.to(x.device)].to(torch.float32), x.shape[2:])
        map = map.view(-1, height, width, x.shape[2]).movedim(-1, 1)
        association = associate(pad_to_cells(map, self.cell, "replicate"), self.cell, self.iterations)
        return association_map(association, frames, height, width, self.cell, view.prefix)


class SuperTokenAttention(nn.Module):
    """The paper's attention layer on maps ``(batch, dim, height, width)``.

    Samples super tokens, lets them attend to each other, and spreads the result over the pixels.

    Parameters have the names of the authors' ``StokenAttention``, so its weights load as they are.

    Args:
        dim: channels.
        cell: ``(height, width)`` of a cell; maps are padded with zeros to whole cells. (1, 1) is plain attention.
        iterations: rounds of assigning pixels and averaging.
        refine: attend between the super tokens; without it the layer only smooths.
        heads: of the attention between super tokens.
        qkv_bias: biases of the query, key and value projections.
    """

    def __init__(
        self,
        dim: int,
        cell: tuple[int, int],
        iterations: int = 1,
        refine: bool = True,
        heads: int = 8,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        if refine and dim % heads:
            raise ThriftError(f"SuperTokenAttention cannot split dim={dim} into {heads} heads; write heads={dim // 32}")
        self.cell, self.iterations = checked_cell(cell, "SuperTokenAttention"), iterations
        self.stoken_refine = MapAttention(dim, heads, qkv_bias) if refine else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.cell == (1, 1):
            return self.stoken_refine(x)
        height, width = x.shape[-2:]
        tokens, association = super_tokens(pad_to_cells(x, self.cell), self.cell, self.iterations)
        return spread(self.stoken_refine(tokens), association, self.cell)[..., :height, :width]


class MapAttention(nn.Module):
    """Multi-head self-attention between the places of a map ``(batch, dim, height, width)``."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Conv2d(dim, dim * 3, 1, bias=qkv_bias)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, *shape = x.shape
        # the channels of a head are its queries, its keys and its values, in this order
        q, k, v = self.qkv(x).reshape(batch, self.heads, dim // self.heads * 3, -1).transpose(2, 3).chunk(3, -1)
        out = scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(2, 3).reshape(batch, dim, *shape))


def checked_cell(cell: object, of: str) -> tuple[int, int]:
    """A cell as a tuple (YAML knows only lists)."""
    good = isinstance(cell, tuple | list) and len(cell) == 2 and all(type(side) is int and side > 0 for side in cell)
    if not good:
        raise ThriftError(f"{of} cell={cell!r} is no (height, width) in patches; write cell=(2, 2)")
    return tuple(cell)  # type: ignore[arg-type,return-value]
