"""Visual tokens between the encoder and the language model: how many stay, and where they are in the image.

A layout's segments are the whole image, its crops, or the frames of a video: grids of ``t`` times ``h`` times ``w``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.tokenmap import TokenMap
from ..core.view import View
from .topk import top_mask


def to_keep(view: View, keep: int | float) -> tuple[Tensor, Tensor] | None:
    """Which tokens may go, ``(batch, tokens)`` bool, and how many of them stay, ``(batch,)``; None where all stay.

    Tokens that must stay (separators of a layout) are not counted: a budget is one of patches.
    """
    free = view.mask & ~view.protected
    lengths = free.sum(1)
    counts = Budget.of(keep).tokens_of(lengths)
    return None if bool((counts == lengths).all()) else (free, counts)


def keep_all(view: View) -> TokenMap:
    """The map that changes nothing; padding is left where it is, so that no bit changes."""
    batch, n = view.mask.shape
    return TokenMap.identity(n, (batch,), view.mask.device)


def keep_chosen(view: View, chosen: Tensor) -> TokenMap:
    """Keep ``chosen`` ``(batch, tokens)`` bool and what must stay, in their order."""
    return TokenMap.keep(chosen | (view.protected & view.mask))


def neighbours(segment: Any, official: bool = False, device: torch.device | str = "cpu") -> Tensor:
    """Of each place of a segment the places left, right, above and below: ``(t * h * w, 4)`` int64.

    Where there is none the place itself stands. With ``official`` the places are those that come before and after it,
    and a width before and after it, in the flat order, clamped to the segment: lines and frames run into each other.
    """
    n = segment.t * segment.h * segment.w
    place = torch.arange(n, device=device)
    around = place.unsqueeze(1) + torch.tensor([-1, 1, -segment.w, segment.w], device=device)
    if official:
        return around.clamp(0, n - 1)
    x, y = place % segment.w, place // segment.w % segment.h
    there = torch.stack([x > 0, x < segment.w - 1, y > 0, y < segment.h - 1], dim=1)
    return torch.where(there, around, place.unsqueeze(1))


def keep_looked_at(view: View, keep: int | float) -> TokenMap:
    """Of what is left of a prompt: its text, and the visual tokens that its last token attends to most.

    Args:
        view: of the prefill stage, with ``attention``, ``visual``, ``visual_lengths`` and ``mask``.
        keep: visual tokens to keep: a share of those that the prompt had, or a count.
    """
    counts = Budget.of(keep).tokens_of(view.visual_lengths)
    if bool((counts >= view.visual.sum(1)).all()):
        return keep_all(view)
    score = view.attention(1)[:, :, -1].mean(1)
    return TokenMap.keep((view.mask & ~view.visual) | top_mask(score, counts, view.visual))
