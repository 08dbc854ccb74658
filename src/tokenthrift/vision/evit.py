"""EViT: keep the patch tokens that CLS attends to, and fuse the others into one."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.clustering import ranked
from ..ops.importance import importance
from ..ops.schedules import Removal
from ..ops.stages import Layers, check_stages, patches_to_keep


@method(
    "evit",
    stage="vision",
    paper="Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
    arxiv="2202.07800",
    needs=("features", "attention", "protected", "prefix", "tokens"),
)
class EViT:
    """Keep the patches with the most attention from CLS in a few layers; the others become one token.

    The fused token is the sum of the dropped ones, each times the attention it got: as in the authors' code no average,
    so that it is small where little was lost. In later layers it is a token like others. The authors fine-tune with the
    reduction; on a model as it comes, ``fuse=False`` may be better. A layer that would fuse a single token is left
    alone, since nothing would be saved. Encoders without CLS rank by the attention from all tokens.

    Parameters:
        keep: share of the patches that is left after the last of the layers, rounded up, in (0, 1]; the papers' 0.7 in
            each of three layers is 0.343.
        layers: where, counted from 0, e.g. ``(3, 6, 9)``, the paper's for 12 layers. None: a quarter, half and three
            quarters of the depth.
        r: instead of both, tokens to remove in every layer, as in ``tome``.
        fuse: False drops what is not kept.
        order: "position" leaves the kept tokens in their order, "official" sorts them by attention; the fused token is
            the last one with both.

    Raises:
        ThriftError: what is said under Parameters does not hold.
    """

    per_layer: ClassVar[str] = "r"

    keep: float = 0.343
    layers: Layers = None
    r: Removal | None = None
    fuse: bool = True
    order: str = "position"

    def __post_init__(self) -> None:
        check_stages(self, "evit", default=EViT.keep)
        if self.order not in ("position", "official"):
            raise ThriftError(f"evit order={self.order!r} is unknown: write order='position' or order='official'")

    def reduce(self, view: View) -> TokenMap | None:
        """The kept tokens, each on its own, and one group of the others."""
        tokens = view.features.shape[1]
        kept = view.prefix + patches_to_keep(view, "evit", self.keep, self.layers, self.r)
        if self.fuse and self.r is not None:
            kept -= 1  # r counts what the layer's output lacks, and the fused token is in it
        kept = max(kept, view.prefix + 1)
        if kept + self.fuse >= tokens:
            return None
        scores = importance(view)
        order = ranked(scores.masked_fill(view.protected, torch.inf))
        index = order[:, :kept] if self.order == "official" else order[:, :kept].sort(dim=-1).values
        if not self.fuse:
            return TokenMap.select(index, tokens)
        group = torch.full_like(order, kept).scatter(1, index, torch.arange(kept, device=index.device).expand_as(index))
        return TokenMap.merge(group, kept + 1, weight=scores, anchor=torch.cat([index, order[:, kept : kept + 1]], 1))

    def combine(self, view: View, map: TokenMap) -> Tensor:
        """The map's tokens, with the fused one as the sum that the authors take."""
        out = map.apply(view.features)
        if not self.fuse:
            return out
        lost = (importance(view) * (map.owner == map.n_out - 1)).sum(-1, keepdim=True)
        return torch.cat([out[:, :-1], out[:, -1:] * lost.unsqueeze(-1).to(out.dtype)], dim=1)
