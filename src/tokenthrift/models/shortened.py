"""A cache of a prompt of which the model read only a part, as a shorter prompt with positions of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from ..core.errors import ThriftError


class ShortenedCache(DynamicCache):
    """Says that it has seen the whole prompt, so that generation feeds what comes after it, and translates that.

    The layers hold the kept tokens and know of no others. While the model runs (:meth:`inside`) the cache is what its
    layers are. It is the user's own cache object, whose class was changed: see :func:`shorten`.

    Attributes:
        real: ``(batch, kept)`` bool, the mask of the shorter prompt.
        dropped: columns of the prompt that are missing.
        shift: ``(batch,)`` by how much later positions are lower.
    """

    real: Tensor
    dropped: int
    shift: Tensor
    _inside: bool

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(super().get_seq_length(layer_idx)) + (0 if self._inside else self.dropped)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While this is entered, the model runs."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def translate(self, call: dict[str, Any], new: int, device: torch.device) -> dict[str, Any]:
        """The mask and the positions of a forward of ``new`` later tokens, as the shorter prompt has them."""
        kept = self.real.shape[1]
        held = int(super().get_seq_length())
        real, mask, positions = self.real.to(device), call.get("attention_mask"), call.get("position_ids")
        if mask is not None and mask.dim() != 2:
            raise ThriftError("after prefill=... the attention mask must be (batch, tokens), with the whole prompt")
        if mask is not None:
            later = mask[:, kept + self.dropped :]
            call = {**call, "attention_mask": torch.cat([real.to(mask.dtype), later], dim=1)}
        elif not bool(real.all()):
            later = real.new_ones(len(real), held + new - kept)
            call = {**call, "attention_mask": torch.cat([real, later], dim=1).long()}
        if positions is None:
            start = real.sum(1, keepdim=True) + (held - kept)
            return {**call, "position_ids": start + torch.arange(new, device=device)}
        return {**call, "position_ids": positions - self.shift.to(device).unsqueeze(1)}

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.real, self.shift = (t.repeat_interleave(repeats, dim=0) for t in (self.real, self.shift))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.real, self.shift = self.real[indices], self.shift[indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.real, self.shift = (t.index_select(0, beam_idx.to(t.device)) for t in (self.real, self.shift))

    def reset(self) -> None:
        super().reset()
        self.__class__ = DynamicCache  # type: ignore[assignment]  # empty: the next prompt begins


def shorten(cache: Cache, real: Tensor, dropped: int, shift: Tensor) -> None:
    """Make a cache that holds only a part of a prompt a :class:`ShortenedCache`; the arguments are its attributes."""
    cache.__class__ = ShortenedCache
    assert isinstance(cache, ShortenedCache)
    cache.real, cache.dropped, cache.shift, cache._inside = real, dropped, shift, False
