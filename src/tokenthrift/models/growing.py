"""A cache layer that appends new tokens in place: the default one copies all keys and values at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..ops.growing import Growing


class GrowingLayer(DynamicLayer):
    """A full cache layer whose keys and values are views of buffers with room to grow.

    In everything else it is a ``DynamicLayer``: whoever sets other tensors as ``keys`` and ``values`` (beam search,
    cropping) is followed, by a copy at the next update where they no longer lie in the buffers.

    Attributes:
        memory: what a method remembers of this layer's keys (summaries of pages, say), by name. Forgotten when entries
            go or rows change places.
        room: entries to spare in new buffers; None for so many that copies stay rare.
    """

    room: int | None = None

    def __init__(self, layer: DynamicLayer | None = None) -> None:
        super().__init__()
        self.memory: dict[str, Any] = {}
        self._buffers = [Growing(), Growing()]  # of keys, of values
        self._views: list[Tensor | None] = [None, None]  # the rows that they gave last
        if layer is not None and layer.is_initialized:
            self.dtype, self.device = layer.dtype, layer.device
            self.keys, self.values, self.is_initialized = layer.keys, layer.values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states)  # what a backward pass needs must not be written over
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append(0, self.keys, key_states)
        self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def let_go(self) -> None:
        """Forget the buffers: what they hold is not the layer's any more."""
        self._buffers = [Growing(self.room), Growing(self.room)]
        self._views = [None, None]

    def _append(self, which: int, held: Tensor | None, new: Tensor) -> Tensor:
        if held is not None and held is self._views[which]:  # nobody touched it since
            self._views[which] = rows = self._buffers[which].append(new)
            return rows
        count = 0 if held is None or held.numel() == 0 else held.shape[-2]
        if held is not None and count and self._buffers[which].holds(held):
            self._buffers[which].cut(count)
        else:
            self._buffers[which] = Growing(self.room)
            if held is not None and count:
                self._buffers[which].append(held)
        self._views[which] = rows = self._buffers[which].append(new)
        return rows

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.memory.clear()

    def reset(self) -> None:
        super().reset()
        self.memory.clear()
        self.let_go()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.memory.clear()

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.memory.clear()

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.memory.clear()
