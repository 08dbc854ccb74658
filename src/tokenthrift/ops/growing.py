"""A tensor that grows by rows, with room to spare, so that appending copies only what is new."""

from __future__ import annotations

import torch
from torch import Tensor

ROOM = 64
"""Rows by which a full buffer grows at least; else by an eighth, so that copies stay rare however long it gets."""


def room_for(count: int, room: int | None = None) -> int:
    """Rows to spare in a new buffer that holds ``count``: ``room``, or so many that copies stay rare."""
    return max(ROOM, count // 8) if room is None else room


def is_locked(buffer: Tensor) -> bool:
    """Whether it was made in inference mode, and cannot be written to here, outside of it."""
    return buffer.is_inference() and not torch.is_inference_mode_enabled()


class Growing:
    """Rows ``(..., rows, dim)`` in a buffer with room; :attr:`rows` is a view of those in use.

    Args:
        room: rows to spare in a new buffer; by default so many that copies stay rare.
    """

    def __init__(self, room: int | None = None) -> None:
        self._room = room
        self._buffer: Tensor | None = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def rows(self) -> Tensor:
        """``(..., count, dim)``, a view: it is not copied, and changes with what is appended after a cut."""
        assert self._buffer is not None, "nothing was appended yet"
        return self._buffer.narrow(-2, 0, self._count)

    def append(self, new: Tensor) -> Tensor:
        """Add ``(..., new, dim)``; returns all rows."""
        end = self._count + new.shape[-2]
        buffer = self._buffer
        if buffer is None or end > buffer.shape[-2] or is_locked(buffer):
            grown = new.new_empty(*new.shape[:-2], end + room_for(end, self._room), new.shape[-1])
            if buffer is not None:
                grown[..., : self._count, :] = self.rows
            self._buffer = buffer = grown
        buffer.narrow(-2, self._count, end - self._count).copy_(new)
        self._count = end
        return self.rows

    def cut(self, count: int) -> None:
        """Keep the first ``count`` rows."""
        self._count = min(count, self._count)

    def holds(self, rows: Tensor) -> bool:
        """Whether ``rows`` are the first rows of this buffer themselves, not a copy of them."""
        buffer = self._buffer
        return (
            buffer is not None
            and rows.data_ptr() == buffer.data_ptr()
            and rows.stride() == buffer.stride()
            and rows.shape[:-2] == buffer.shape[:-2]
            and rows.shape[-2] <= self._count
        )
