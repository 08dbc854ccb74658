"""A cache of a prompt whose visual tokens were reduced: it speaks of the user's columns, and holds fewer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from ..core.errors import ThriftError


class ConnectorCache(DynamicCache):
    """Says that it has seen the prompt as the user wrote it, so that generation feeds what comes after it.

    The layers hold the tokens that are left and know of no others. While the language model runs (:meth:`inside`) the
    cache is what its layers are. It is the user's own cache object, whose class was changed: see :func:`remember`.

    Attributes:
        columns: ``(batch, held)`` int64, the columns of the prompt that the first entries of the layers came from,
            ascending, after -1 where a row has fewer. Later columns are all there.
        total: columns of the prompt so far as the user counts, up to and with those in ``columns``.
        shift: ``(batch,)`` int64, by how much later positions are lower.
        gone: ``(batch,)`` int64, how many tokens of each row were dropped.
        full: no -1 in ``columns``.
    """

    columns: Tensor
    total: int
    shift: Tensor
    gone: Tensor
    full: bool
    _inside: bool

    @property
    def dropped(self) -> int:
        """Columns that the layers do not have."""
        return self.total - self.columns.shape[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(super().get_seq_length(layer_idx)) + (0 if self._inside else self.dropped)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if self._inside:
            return super().get_mask_sizes(query_length, layer_idx)
        return self.get_seq_length() + query_length, 0  # masks made outside are over all columns, and cut inside

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self._inside:
            raise ThriftError(
                "this cache holds a prompt whose visual tokens were reduced: go on inside a with block of "
                "tokenthrift.apply with a connector stage"
            )
        return super().update(*args, **kwargs)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While this is entered, the language model runs."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def held(self, mask: Tensor) -> Tensor:
        """Of ``(..., columns)`` over all columns that the user knows, those of the entries: ``(batch, ..., held)``.

        Entries that are padding have the value of some column."""
        index = self.columns.clamp(min=0)
        first = mask[..., : self.total]
        if mask.dim() == 2:
            first = first.expand(len(index), -1).gather(1, index)
        else:
            index = index.view(len(index), *(1,) * (mask.dim() - 2), -1)
            first = first.expand(len(index), *first.shape[1:]).gather(-1, index.expand(-1, *mask.shape[1:-1], -1))
        later = mask[..., self.total :]
        return torch.cat([first, later.expand(len(first), *later.shape[1:])], dim=-1)

    def real(self, mask: Tensor | None, new: int) -> Tensor | None:
        """``(batch, held + new)`` bool: which entries, and which of so many new tokens, are no padding.

        ``mask`` is the user's, over all columns; without one everything is real, and None says so.
        """
        if mask is None and self.full:
            return None
        there = self.columns >= 0
        if mask is not None:
            out = self.held(mask).bool()
            out[:, : there.shape[1]] &= there
            return out
        later = int(super().get_seq_length()) - there.shape[1] + new
        return torch.cat([there, there.new_ones(len(there), later)], dim=1)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rows(lambda t: t[indices])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def _rows(self, change: Any) -> None:
        self.columns, self.shift, self.gone = (change(t) for t in (self.columns, self.shift, self.gone))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens.

        Raises:
            ThriftError: these reach into the prompt that was reduced.
        """
        count = abs(tokens_to_remove)
        if count > self.get_seq_length() - self.total:
            raise ThriftError(
                f"{count} tokens cannot be taken back: the visual tokens before were reduced; begin with an empty cache"
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.__class__ = DynamicCache  # type: ignore[assignment]  # empty: the next prompt begins


def remember(cache: Cache, columns: Tensor, total: int, shift: Tensor, gone: Tensor) -> None:
    """Make a cache that holds only a part of a prompt a :class:`ConnectorCache`; the arguments are its attributes."""
    cache.__class__ = ConnectorCache
    assert isinstance(cache, ConnectorCache)
    cache.columns, cache.total, cache.shift, cache.gone, cache._inside = columns, total, shift, gone, False
    cache.full = bool((columns >= 0).all())


def check_cache(cache: Any) -> None:
    """Refuse a cache that cannot hold fewer columns than generation counts.

    Raises:
        ThriftError: says which cache to use.
    """
    if cache is not None and type(cache) not in (DynamicCache, ConnectorCache):
        raise ThriftError(
            f"visual tokens cannot be dropped from a {type(cache).__name__}: use the default cache "
            "(no cache_implementation, no quantized or offloaded cache)"
        )
