"""One forward for rows of different lengths and for trees: all new tokens packed into one row, each row's own cache.

The new tokens of every row of a batch go through the model as one sequence ``(1, tokens)``, so that only tokens that
are there cost anything. Keys and values live in buffers ``(batch, kv_heads, columns, dim)`` with room to grow, in which
rows may end at different columns. Only attention knows of rows: it runs on the buffers with a mask, in which a token
sees its row's past and its own ancestors in the draft.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..core.draft import Draft
from .attention import BASES, PREFIX, answered_by, is_replaced
from .connector_cache import ConnectorCache
from .kv import ReducedLayer, biased

ROOM = 256
"""Columns by which a buffer that is full grows at least."""


class Step:
    """What is fed in one forward: of each row its last committed token, then its draft.

    Attributes:
        fed: of each row, how many of these tokens earlier forwards put into the cache, not committed yet: a tree that
            grows is fed piece by piece.
        widths: tokens of each row that are fed now; 0 for rows that are done.
        live: the rows from the first to the last that feed any: attention leaves the others alone.
        rows, offsets: ``(tokens,)`` int64, the row of every packed token and its place among those of its row.
        masks: masks that layers of one kind share, made at first use; ``tiled`` these as attention takes them.
        places: for layers that held so many columns, where the tokens go.
    """

    def __init__(self, drafts: Sequence[Draft | None], device: torch.device, fed: Sequence[int] | None = None) -> None:
        self.drafts = drafts
        self.fed = [0] * len(drafts) if fed is None else list(fed)
        self.widths = [
            0 if draft is None else len(draft) + 1 - before for draft, before in zip(drafts, self.fed, strict=True)
        ]
        feeding = [row for row, width in enumerate(self.widths) if width] or [0]
        self.live = slice(feeding[0], feeding[-1] + 1)
        self.device = device
        self.masks: dict[tuple[int, int | None, bool], Tensor | None] = {}
        self.tiled: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.places: dict[int, Tensor] = {}
        if len(drafts) > 1:
            widths = torch.tensor(self.widths)
            self.rows = torch.arange(len(drafts)).repeat_interleave(widths).to(device)
            starts = widths.cumsum(0) - widths
            self.offsets = (torch.arange(int(widths.sum())) - starts.repeat_interleave(widths)).to(device)

    @property
    def depths(self) -> list[int]:
        """Of every packed token, below its row's last committed one."""
        rows = zip(self.drafts, self.fed, strict=True)
        return [d for draft, fed in rows if draft is not None for d in (0, *draft.depths)[fed:]]

    def columns(self, base: int, grown: Sequence[int]) -> int:
        """Of a buffer that has this step's tokens: ``base``, then of a live row what was committed, then the step."""
        rows = zip(grown[self.live], self.fed[self.live], self.widths[self.live], strict=True)
        return base + max(g + f + w for g, f, w in rows)


class Packing:
    """How far each row has come, for all layers.

    Attributes:
        seen: columns of the text when packing began, padding included.
        lengths: real tokens of each row then.
        grown: tokens committed to the cache since, row by row.
        real: ``(batch, seen)`` bool, false for padding; None where there is none.
    """

    def __init__(self, batch: int, seen: int, real: Tensor | None) -> None:
        self.seen, self.real = seen, real
        self.lengths: list[int] = [seen] * batch if real is None else real.sum(1).tolist()
        self.grown = [0] * batch
        self.step: Step

    def places(self, base: int) -> Tensor:
        """``(tokens,)`` int64: the columns that the packed tokens go to, in a layer that held ``base`` columns."""
        step = self.step
        if base not in step.places:
            starts = torch.tensor([base + g + f for g, f in zip(self.grown, step.fed, strict=True)], device=step.device)
            step.places[base] = starts[step.rows] + step.offsets
        return step.places[base]

    def positions(self) -> list[int]:
        """Of the packed tokens, each in its own row's text."""
        starts = [n + g for n, g, w in zip(self.lengths, self.grown, self.step.widths, strict=True) for _ in range(w)]
        return [start + depth for start, depth in zip(starts, self.step.depths, strict=True)]

    def mask(self, base: int, window: int | None, reduced: bool) -> Tensor | None:
        """``(live rows, 1, widest row, columns)`` bool for a layer that held ``base`` columns; None: all is seen.

        Of the columns that a reduced layer held, all count as seen here.
        """
        masks, key = self.step.masks, (base, window, reduced)
        if key not in masks:
            held = None if reduced or self.real is None else self.real[self.step.live, self.seen - base :].cpu()
            masks[key] = self._mask(base, window, None if held is None or bool(held.all()) else held)
        return masks[key]

    def _mask(self, base: int, window: int | None, held: Tensor | None) -> Tensor | None:
        step, grown = self.step, self.grown
        width, columns = max(step.widths), step.columns(base, grown)
        live = step.live
        if live.stop - live.start == 1 and window is None and held is None and width == 1:
            draft = step.drafts[live.start]
            if draft is None or draft.is_chain:
                return None
        rows = zip(step.drafts[live], self.lengths[live], grown[live], step.fed[live], step.widths[live], strict=True)
        mask = torch.zeros(live.stop - live.start, 1, width, columns, dtype=torch.bool)
        places = torch.zeros(len(mask), columns, dtype=torch.long)
        for b, (draft, n, g, f, w) in enumerate(rows):
            mask[b, 0, :, :base] = True if held is None else held[b]
            mask[b, 0, :, base : base + g] = True
            if draft is None:
                continue
            new = slice(base + g, base + g + f + w)
            mask[b, 0, :w, new] = draft.ancestors()[f:]
            if window is not None:
                past = torch.ones(base, dtype=torch.long) if held is None else held[b].long()
                places[b, :base] = n - past.flip(0).cumsum(0).flip(0)
                places[b, base : base + g] = n + torch.arange(g)
                places[b, new] = n + g + torch.tensor([0, *draft.depths])
                mask[b, 0, :w] &= places[b, new, None][f:] - places[b] < window
        return mask.to(step.device)


class PackedLayer(CacheLayerMixin):
    """The keys and values of one layer in buffers with room; see the module."""

    is_croppable = False

    def __init__(self, layer: DynamicLayer, packing: Packing) -> None:
        super().__init__()
        self.layer, self.packing = layer, packing
        self.base = int(layer.keys.shape[-2])  # type: ignore[union-attr]
        self.window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        self.is_sliding = self.window is not None
        if self.window is not None:
            self.sliding_window = self.window
        self.keys, self.values = layer.keys, layer.values
        self.dtype, self.device = layer.dtype, layer.device
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a packed layer begins with what another layer holds")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put ``(1, kv_heads, tokens, dim)`` where they belong; returns all columns in use."""
        packing, step = self.packing, self.packing.step
        columns = step.columns(self.base, packing.grown)
        self._make_room(columns)
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            assert buffer is not None
            if len(packing.grown) == 1:
                buffer[:, :, columns - step.widths[0] : columns] = new
            else:
                buffer[step.rows, :, packing.places(self.base)] = new[0].transpose(0, 1)
        assert self.keys is not None and self.values is not None
        return self.keys[:, :, :columns], self.values[:, :, :columns]

    def mask(self, heads: int) -> Tensor | None:
        """Of this step: ``(live rows, 1 or heads, widest row, columns)`` bool, or None if everything is seen; additive
        where entries count for several tokens."""
        plain = self.packing.mask(self.base, self.window, isinstance(self.layer, ReducedLayer))
        real, bias = getattr(self.layer, "real", None), getattr(self.layer, "bias", None)
        if real is None and bias is None:
            return plain
        assert self.keys is not None
        live = self.packing.step.live
        if plain is None:
            columns = self.packing.step.columns(self.base, self.packing.grown)
            plain = torch.ones(1, 1, 1, columns, dtype=torch.bool, device=self.keys.device)
        if real is not None:
            seen = functional.pad(real[live], (0, plain.shape[-1] - self.base), value=True)
            plain = plain & seen.repeat_interleave(heads // seen.shape[1], dim=1).unsqueeze(2)
        return plain if bias is None else biased(plain, bias[live], heads, self.keys.dtype)

    def _make_room(self, columns: int) -> None:
        assert self.keys is not None and self.values is not None
        if columns > self.keys.shape[-2]:
            room = max(ROOM, columns // 4) + columns - self.keys.shape[-2]
            self.keys, self.values = (functional.pad(t, (0, 0, 0, room)) for t in (self.keys, self.values))
            # The layer's own tensors are not needed beside them.
            self.layer.keys, self.layer.values = (t[:, :, : self.base] for t in (self.keys, self.values))

    def keep(self, row: int, nodes: Sequence[int]) -> None:
        """Close up: of a row's new tokens keep the first and these nodes of its draft."""
        if list(nodes) == list(range(len(nodes))):
            return
        start = self.base + self.packing.grown[row] + 1
        for buffer in (self.keys, self.values):
            assert buffer is not None
            kept = buffer[row][:, [start + node for node in nodes]]
            buffer[row, :, start : start + len(nodes)] = kept

    def give_back(self) -> None:
        """Hand what is committed to the layer that this one stands for."""
        grown, layer = self.packing.grown, self.layer
        columns = self.base + max(grown)
        keys, values = (t[:, :, :columns] for t in (self.keys, self.values))  # type: ignore[index]
        for row, g in enumerate(grown):  # behind shorter rows only drafts were
            keys[row, :, self.base + g :] = 0
            values[row, :, self.base + g :] = 0
        if self.window is not None:
            keys, values = (t[:, :, -self.window + 1 :] for t in (keys, values))
            layer.cumulative_length += max(grown)  # type: ignore[attr-defined]
        if isinstance(layer, ReducedLayer):
            layer.take(keys, values, grown)
        layer.keys, layer.values = keys, values
        self.keys = self.values = None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        stored = self.base + max(self.packing.grown)
        return stored + query_length, self.get_seq_length() - stored

    def get_seq_length(self) -> int:
        return self.packing.seen + max(self.packing.grown)

    def get_max_length(self) -> int:
        return -1


class PackedCache(Cache):
    """A cache of packed layers in place of another cache, until :meth:`give_back`."""

    def __init__(self, cache: Cache, real: Tensor | None) -> None:
        keys = cache.layers[0].keys
        assert keys is not None
        self.packing = Packing(keys.shape[0], int(cache.get_seq_length()), real)
        self.packed = [PackedLayer(layer, self.packing) for layer in cache.layers]
        super().__init__(layers=list(self.packed))

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Commit, row by row, the fed token and these nodes; rows that fed nothing have nothing."""
        live = [row for row, draft in enumerate(self.packing.step.drafts) if draft is not None]
        for row in live:
            for layer in self.packed:
                layer.keep(row, paths[row])
        for row in live:
            self.packing.grown[row] += len(paths[row]) + 1

    def give_back(self) -> None:
        """Make the cache that this one stands for hold what is committed. Columns stay those of the text."""
        for layer in self.packed:
            layer.give_back()


def can_pack(modules: Sequence[nn.Module], cache: Any) -> bool:
    """Whether attention modules can read packed rows, and their cache can be taken over.

    They cannot where the attention function takes no mask, where tokens have several positions (images), or columns of
    the prompt are no columns of the cache (reduced images), where another session answers the attention calls, and
    where a layer is of a kind of its own.
    """
    if isinstance(cache, ConnectorCache):
        return False
    kinds = (DynamicLayer, DynamicSlidingWindowLayer, ReducedLayer)
    return len(modules) == len(cache.layers) > 0 and all(
        type(layer) in kinds
        and layer.is_initialized
        and not is_replaced(module)
        and str(module.config._attn_implementation).removeprefix(PREFIX) in BASES  # type: ignore[union-attr]
        and "mrope_section" not in str(getattr(module.config, "rope_parameters", None))
        for module, layer in zip(modules, cache.layers, strict=True)
    )


# ---- attention over packed rows -------------------------------------------------------------------------------------

_current: ContextVar[PackedCache] = ContextVar("packed cache")


@contextmanager
def packed_attention(modules: Sequence[nn.Module], cache: PackedCache) -> Iterator[None]:
    """While this is entered, the modules' attention runs on the rows of ``cache``."""
    token = _current.set(cache)
    try:
        with answered_by("packed", modules, _attention_over):
            yield
    finally:
        _current.reset(token)


def _attention_over(base: str) -> Any:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        cache = _current.get()
        layer, step = cache.packed[module.layer_idx], cache.packing.step  # type: ignore[index]
        mask = layer.mask(query.shape[1])
        if len(step.widths) == 1:
            return _attend(base, module, query, key, value, mask, step, kwargs), None
        batch, width = step.live.stop - step.live.start, max(step.widths)
        key, value = key[step.live], value[step.live]
        if min(step.widths[step.live]) == width:  # nothing to fill up
            rows = query[0].transpose(0, 1).reshape(batch, width, query.shape[1], query.shape[-1]).transpose(1, 2)
            out = _attend(base, module, rows, key, value, mask, step, kwargs)
            return out.reshape(1, batch * width, *out.shape[2:]), None
        rows = query.new_zeros(batch, width, query.shape[1], query.shape[-1])
        at = step.rows - step.live.start, step.offsets
        rows[at] = query[0].transpose(0, 1)
        out = _attend(base, module, rows.transpose(1, 2), key, value, mask, step, kwargs)
        return out[at].unsqueeze(0), None

    return attention


def _attend(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    step: Step,
    kwargs: dict[str, Any],
) -> Tensor:
    """``(batch, tokens, heads, dim)``."""
    shared = query.shape[1] // key.shape[1]
    exotic = any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    if base == "sdpa" and not exotic and (mask is None or mask.shape[1] == 1):
        # The query heads that share a key head as further queries of it: keys and values are not copied.
        batch, heads, width, dim = query.shape
        grouped = query.reshape(batch, heads // shared, shared * width, dim)
        if mask is not None:
            mask = _tiled(mask, shared, step, query)
        out = functional.scaled_dot_product_attention(grouped, key, value, mask, scale=kwargs.get("scaling"))
        return out.reshape(batch, heads, width, -1).transpose(1, 2)
    if mask is not None and base == "eager":
        mask = _tiled(mask, 1, step, query)
    default = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    run: Any = ALL_ATTENTION_FUNCTIONS.get_interface(base, default)
    kwargs = {**kwargs, "is_causal": False}
    attended: Tensor = run(module, query, key, value, mask, **kwargs)[0]
    return attended


def _tiled(mask: Tensor, shared: int, step: Step, query: Tensor) -> Tensor:
    """The mask as a bias, for query heads that share a key head one below the other; made once a step."""
    key = (id(mask), shared)
    if key not in step.tiled:
        bias = biased(mask, None, mask.shape[1], query.dtype) if mask.dtype == torch.bool else mask
        step.tiled[key] = mask, bias.repeat(1, 1, shared, 1)  # with the mask, so that no other gets its id
    return step.tiled[key][1]
