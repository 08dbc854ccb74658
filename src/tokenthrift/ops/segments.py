"""Segments: neighbouring tokens that belong together, such as the pieces of one word or name."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PoolMode = Literal["mean", "sum", "max"]


def segment_starts(group_ids: Tensor, alone: Tensor | None = None) -> Tensor:
    """``(batch, tokens)`` bool: the tokens with which a segment begins.

    Args:
        group_ids: ``(batch, tokens)`` int64; neighbours with the same id are one segment.
        alone: ``(batch, tokens)`` bool, tokens that are a segment of their own whatever their id.
    """
    first = torch.ones_like(group_ids[:, :1], dtype=torch.bool)
    starts = torch.cat([first, group_ids[:, 1:] != group_ids[:, :-1]], dim=1)
    if alone is None:
        return starts
    return starts | alone | torch.cat([first, alone[:, :-1]], dim=1)


def segment_pool(x: Tensor, group_ids: Tensor, mode: PoolMode = "mean") -> Tensor:
    """Pool the tokens of every segment: ``(batch, tokens, dim)`` to ``(batch, segments, dim)``, in ``x``'s dtype.

    ``segments`` is the largest number in the batch; rows with fewer end in zeros. Sums are kept in float32.
    """
    slot = segment_starts(group_ids).cumsum(-1) - 1
    segments = int(slot.max()) + 1 if slot.numel() else 0
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    out = wide.new_zeros(x.shape[0], segments, x.shape[2])
    how: Literal["mean", "sum", "amax"] = "amax" if mode == "max" else mode
    out = out.scatter_reduce(1, slot.unsqueeze(-1).expand(x.shape), wide, how, include_self=False)
    return out.to(x.dtype)
