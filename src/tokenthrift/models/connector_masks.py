"""Attention masks of a prompt of which some columns are gone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


def shorten_masks(
    given: Any, padding: Tensor | None, columns: Tensor, new: Tensor, cache: Cache | None, window: int | None
) -> Any:
    """The mask for the tokens that are left, of the kind that the language model was to get.

    Where that is causal, the language model makes it from ``(batch, held)``. A mask of four dimensions (images whose
    tokens see each other, say) is cut; those of layers with a sliding window are the cut mask of the other layers,
    with the window over what is left.

    Args:
        given: what the language model was to get: ``(batch, all)``, ``(batch, 1, n, all)``, one of these by kind of
            layer, or None.
        padding: the user's ``(batch, all)``, or None.
        columns: ``(batch, held)``, of all columns those that are left, -1 for padding.
        new: ``(batch, m)``, those of this forward among the ``n``, -1 for padding.
        cache: that is filled.
        window: of sliding layers.
    """
    there = columns >= 0
    if isinstance(given, dict):
        wide = {kind: mask for kind, mask in given.items() if mask is not None}
        if wide:
            base = next((mask for kind, mask in wide.items() if "sliding" not in kind), next(iter(wide.values())))
            cut = _cut(base, columns, new)
            return {kind: _near(cut, window, cache) if "sliding" in kind else cut for kind in given}
        given = padding
    if given is not None and given.dim() == 4:
        return _cut(given, columns, new)
    mask = padding if given is None else given
    if mask is None:
        return None if bool(there.all()) else there.long()
    return (mask.expand(len(columns), -1).gather(1, columns.clamp(min=0)).bool() & there).long()


def _cut(mask: Tensor, columns: Tensor, new: Tensor) -> Tensor:
    """Rows and columns of ``(batch or 1, heads or 1, n, all)``; padding sees itself only, lest its rows be NaN."""
    batch, m, held = len(columns), new.shape[1], columns.shape[1]
    seen = mask if mask.dtype == torch.bool else mask >= 0
    seen = seen.expand(batch, *seen.shape[1:])
    heads = seen.shape[1]
    rows = new.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, seen.shape[-1])
    seen = seen.gather(2, rows)
    seen = seen.gather(3, columns.clamp(min=0)[:, None, None].expand(-1, heads, m, -1))
    seen = seen & (columns >= 0)[:, None, None]
    itself = torch.arange(held, device=seen.device) == torch.arange(held - m, held, device=seen.device)[:, None]
    seen = torch.where((new >= 0)[:, None, :, None], seen, itself)
    return _as(seen, mask)


def _as(seen: Tensor, like: Tensor) -> Tensor:
    if like.dtype == torch.bool:
        return seen
    zeros = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
    return zeros.masked_fill_(~seen, torch.finfo(like.dtype).min)


def _near(cut: Tensor, window: int | None, cache: Cache | None) -> Tensor:
    """For layers with a window: that many of the tokens that are left, of those that their cache still holds."""
    if window is None:
        return cut
    m, held = cut.shape[-2:]
    at = torch.arange(held, device=cut.device)
    far = at[held - m :, None] - at >= window
    out = cut & ~far if cut.dtype == torch.bool else cut.masked_fill(far, torch.finfo(cut.dtype).min)
    sliding = [] if cache is None else [i for i, slides in enumerate(cache.is_sliding) if slides]
    return out[..., -cache.layers[sliding[0]].get_mask_sizes(m)[0] :] if cache is not None and sliding else out
