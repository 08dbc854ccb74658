"""What becomes of entries that are not kept: they may join those that are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core.tokenmap import TokenMap

MERGES = ("weighted", "pivot")
_BLOCK = 1024
"""So many tokens are compared with the kept ones at a time."""


def merge_evicted(keys: Tensor, kept: TokenMap, mask: Tensor, how: str) -> TokenMap:
    """Let each evicted token join the kept one whose key is most similar, in the manner of LOOK-M (arXiv 2406.18139).

    Args:
        keys: ``(batch, kv_heads, n, dim)``.
        kept: a selection over ``(batch, kv_heads)``.
        mask: ``(batch, n)`` bool, false for padding, which joins nothing.
        how: ``"weighted"``: in the mean of those that join, an evicted token counts ``(1 + cosine) / 2``, the kept one
            1. ``"pivot"``: the mean of the kept one and of the middles between it and each evicted one.
    """
    evicted = mask.unsqueeze(1) & ~kept.kept
    unit = normalize(keys.to(torch.float32), dim=-1)
    centres, spare = kept.apply(unit).mT, ~kept.mask.unsqueeze(-2)
    blocks = [
        (block @ centres).masked_fill(spare, float("-inf")).max(-1) for block in torch.split(unit, _BLOCK, dim=-2)
    ]
    cosine, nearest = (torch.cat(parts, -1) for parts in zip(*blocks, strict=True))
    group = torch.where(evicted, nearest, kept.owner)
    if how == "weighted":
        mass = torch.where(evicted, ((1 + cosine) / 2).clamp(min=1e-6), 1.0)
    else:
        joining = cosine.new_zeros(*group.shape[:-1], kept.n_out).scatter_add_(-1, nearest, evicted.to(cosine.dtype))
        mass = torch.where(evicted, 1.0, 2 + joining.gather(-1, group.clamp(min=0)))
    return TokenMap.merge(group, kept.n_out, mass, anchor=kept.anchors)
