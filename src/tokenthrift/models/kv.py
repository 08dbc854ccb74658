"""A cache layer that holds fewer entries than it has seen, and keeps positions and masks right all the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..core.tokenmap import TokenMap


class ReducedLayer(DynamicLayer):
    """Keys and values after a reduction: evicted entries are gone, their memory is free.

    ``get_seq_length`` counts *seen* tokens, so that later tokens get their true positions; keys are stored after RoPE,
    so the kept ones need no new rotation.

    Attributes:
        keys, values: ``(batch, kv_heads, stored, head_dim)``.
        real: ``(batch, kv_heads, stored)`` bool, false for padding and in rows that keep fewer; None if all are.
        bias: ``(batch, kv_heads, stored)`` float32, added to the entries' logits: the logarithm of how many tokens each
            counts for; None where each is one.
        seen: tokens that passed through the layer.
        whole: nothing was dropped or moved, so that masks made for the text fit.

    Args:
        keys, values: ``(batch, kv_heads, seen, head_dim)``, all that the layer has seen.
        map: what to keep, over ``(batch, kv_heads)``.
        mask: ``(batch, seen)`` bool, true for real tokens.
        proportional: entries that several tokens were merged into count in attention as often as they have tokens.
    """

    keys: Tensor  # type: ignore[assignment]  # never None here
    values: Tensor  # type: ignore[assignment]

    def __init__(
        self, keys: Tensor, values: Tensor, map: TokenMap, mask: Tensor, *, proportional: bool = False
    ) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.seen = keys.shape[-2]
        self.keys, self.values = map.apply(keys), map.apply(values)
        self._kept = map.positions("anchor")
        real = map.mask & mask.unsqueeze(1).expand(keys.shape[:-1]).gather(-1, map.anchors)
        self.real: Tensor | None = None if bool(real.all()) else real
        sizes = map.sizes() if proportional and not map.is_selection else None
        self.bias: Tensor | None = None if sizes is None or bool((sizes <= 1).all()) else sizes.clamp(min=1).log()
        self.whole = map.is_identity
        self.is_initialized = True

    @property
    def dropped(self) -> int:
        """Entries per head that are no longer stored."""
        return self.seen - int(self.keys.shape[-2])

    @property
    def positions(self) -> Tensor:
        """``(batch, kv_heads, stored)`` int64: where the entries stand in the text, prompt and later tokens."""
        kept = self._kept[..., : self.keys.shape[-2]]
        later = self.keys.shape[-2] - kept.shape[-1]
        fresh = torch.arange(self.seen - later, self.seen, device=kept.device)
        return torch.cat([kept, fresh.expand(*kept.shape[:-1], later)], dim=-1)

    @property
    def entries(self) -> int:
        """Real entries stored, over all rows and heads."""
        return self.keys.shape[:-1].numel() if self.real is None else int(self.real.sum())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = key_states.shape[-2]
        if self.real is not None:
            self.real = torch.nn.functional.pad(self.real, (0, new), value=True)
        if self.bias is not None:
            self.bias = torch.nn.functional.pad(self.bias, (0, new))
        self.seen += new
        return super().update(key_states, value_states)

    def take(self, keys: Tensor, values: Tensor, grown: Sequence[int]) -> None:
        """Hold these instead: what was there, then new tokens, ``grown`` of them row by row."""
        new = keys.shape[-2] - self.keys.shape[-2]
        if self.real is not None or min(grown) < new:
            real = torch.ones(keys.shape[:-1], dtype=torch.bool, device=keys.device) if self.real is None else self.real
            self.real = torch.nn.functional.pad(real[..., : self.keys.shape[-2]], (0, new))
            for row, count in enumerate(grown):
                self.real[row, :, self.keys.shape[-2] :][:, :count] = True
        if self.bias is not None:
            self.bias = torch.nn.functional.pad(self.bias[..., : self.keys.shape[-2]], (0, new))
        self.keys, self.values = keys, values
        self.seen += new

    def get_seq_length(self) -> int:
        return self.seen if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        stored = self.keys.shape[-2] if self.is_initialized else 0
        return stored + query_length, self.seen - stored

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens (rejected drafts)."""
        super().crop(tokens_to_remove)
        stored = self.keys.shape[-2]
        self._rows(lambda t: t[..., :stored])
        self.seen -= abs(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.seen, self.real, self.bias = 0, None, None
        self._kept = self._kept[..., :0]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rows(lambda t: t[indices, ...])

    def _rows(self, change: Any) -> None:
        self._kept = change(self._kept)
        self.real = None if self.real is None else change(self.real)
        self.bias = None if self.bias is None else change(self.bias)


def biased(seen: Tensor, bias: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to logits.

    Args:
        seen: ``(batch, heads or 1, q, columns)`` bool.
        bias: ``(batch, kv_heads, entries)``, of the first columns (the others, if any, have none).
        heads: query heads.
        dtype: of the queries.

    Returns:
        ``(batch, heads or 1, q, columns)``.
    """
    out = torch.zeros_like(seen, dtype=dtype)
    if bias is not None:
        columns = min(bias.shape[-1], seen.shape[-1])
        out = out.repeat(bias.shape[0] // seen.shape[0], heads // seen.shape[1], 1, 1)
        out[..., :columns] += bias[..., None, :columns].repeat_interleave(heads // bias.shape[1], dim=1).to(dtype)
    return out.masked_fill_(~seen, torch.finfo(dtype).min)
