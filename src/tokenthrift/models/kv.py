"""Cache layers that hold fewer entries than they have seen, and keep positions and masks right all the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ..core.errors import ThriftError
from ..core.tokenmap import TokenMap
from ..ops.growing import is_locked, room_for
from ..ops.rotary import Rotary
from .growing import GrowingLayer

FEW = 16
"""So many heads of all rows are faster one by one, each with its own entries, than together with padding."""


def reduced_layer(
    keys: Tensor, values: Tensor, map: TokenMap, mask: Tensor, *, proportional: bool = False
) -> ReducedLayer:
    """A layer that holds what ``map`` keeps: compactly, where the heads of a row keep different numbers of entries."""
    lengths = map.mask.sum(-1)
    kind = RaggedLayer if bool((lengths != lengths[:, :1]).any()) else ReducedLayer
    return kind(keys, values, map, mask, proportional=proportional)


class ReducedLayer(GrowingLayer):
    """Keys and values after a reduction: evicted entries are gone, their memory is free.

    ``get_seq_length`` counts *seen* tokens, so that later tokens get their true positions; keys are stored after RoPE,
    so the kept ones need no new rotation. Rows that keep fewer entries have their padding in front, as a prompt padded
    on its left has: the newest entries are always the last ones.

    Attributes:
        keys, values: ``(batch, kv_heads, stored, head_dim)``.
        real: ``(batch, kv_heads, stored)`` bool, false for padding and in rows that keep fewer; None if all are.
        bias: ``(batch, kv_heads, stored)`` float32, added to the entries' logits: the logarithm of how many tokens each
            counts for; None where each is one.
        seen: tokens that passed through the layer; ``came`` ``(batch,)`` how many of these are no padding.
        whole: nothing was dropped or moved, so that masks made for the text fit.
        map: from the tokens seen until the last reduction to the entries stored then.
        received: ``(batch, kv_heads, stored)`` float32, attention that the entries got from all queries so far, mean
            over the query heads; None where no method asks for it.
        queries: ``(batch, heads, some, head_dim)``, those of the last tokens; None where no method asks for them.
        rotary: how these were rotated; None where no method asks for it.

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
        self.map = _padding_first(map)
        self._came, self._since = mask.sum(-1), 0
        self.proportional = proportional
        self.received: Tensor | None = None
        self.queries: Tensor | None = None
        self.rotary: Rotary | None = None
        self.real: Tensor | None = None
        self._keep(keys, values, self.map, mask.unsqueeze(1).expand(keys.shape[:-1]))
        sizes = self.map.sizes() if proportional and not self.map.is_selection else None
        self.bias: Tensor | None = None if sizes is None or bool((sizes <= 1).all()) else sizes.clamp(min=1).log()
        self.whole = self.map.is_identity
        self.is_initialized = True

    def _keep(self, keys: Tensor, values: Tensor, map: TokenMap, real: Tensor) -> None:
        self.keys, self.values = map.apply(keys), map.apply(values)
        real = map.mask & real.gather(-1, map.anchors)
        self.real = None if bool(real.all()) else real
        if not map.is_identity:
            self.let_go()

    @property
    def stored(self) -> int:
        """Columns of keys and values."""
        return int(self.keys.shape[-2])

    @property
    def fresh(self) -> int:
        """Tokens that came since the last reduction: these are all stored, as the last columns."""
        return self.seen - self.map.n_in

    @property
    def dropped(self) -> int:
        """Entries per head that are no longer stored."""
        return self.seen - self.stored

    @property
    def held(self) -> Tensor:
        """``(batch, kv_heads, stored)`` bool: the entries that are real."""
        if self.real is not None:
            return self.real
        return torch.ones(*self.map.lead, self.stored, dtype=torch.bool, device=self.map.device)

    @property
    def positions(self) -> Tensor:
        """``(batch, kv_heads, stored)`` int64: where the entries stand in the text, prompt and later tokens."""
        return self.map.extend(self.fresh).positions("anchor")

    @property
    def entries(self) -> int:
        """Real entries stored, over all rows and heads."""
        return self.stored * math.prod(self.map.lead) if self.real is None else int(self.real.sum())

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values, with the room kept for tokens to come."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._count(key_states.shape[-2])
        return super().update(key_states, value_states)

    def _count(self, new: int) -> None:
        """So many tokens come, all of them real as far as is known."""
        if self.real is not None:
            self.real = pad(self.real, (0, new), value=True)
        if self.bias is not None:
            self.bias = pad(self.bias, (0, new))
        self.seen += new
        self._since += new

    @property
    def came(self) -> Tensor:
        return self._came + self._since

    @came.setter
    def came(self, came: Tensor) -> None:
        self._came, self._since = came, 0

    def hide(self, new: Tensor) -> None:
        """Of the tokens that came last, some are padding: ``new`` ``(batch, tokens)`` bool is false for these."""
        if bool(new.all()):
            return
        self.real = self.held
        self.real[..., self.stored - new.shape[-1] :] &= new.unsqueeze(1)
        self.came = self.came - (~new).sum(-1)

    def reduce(self, map: TokenMap) -> None:
        """Reduce once more: ``map`` is over the entries that are stored now."""
        if not map.is_identity:
            map = _padding_first(map)
            self._keep(self.keys, self.values, map, self.held)
            if self.received is not None:
                self.received = map.sizes(self.received)
            if self.bias is not None or (self.proportional and not map.is_selection):
                sizes = map.sizes(None if self.bias is None else self.bias.exp())
                self.bias = sizes.clamp(min=1).log()
            self.whole = False
        self.map = self.map.extend(self.fresh).then(map)

    def take(self, keys: Tensor, values: Tensor, grown: Sequence[int]) -> None:
        """Hold these instead: what was there, then new tokens, ``grown`` of them row by row."""
        new = keys.shape[-2] - self.stored
        if self.real is not None or min(grown) < new:
            real = torch.ones(keys.shape[:-1], dtype=torch.bool, device=keys.device) if self.real is None else self.real
            self.real = pad(real[..., : self.stored], (0, new))
            for row, count in enumerate(grown):
                self.real[row, :, self.stored :][:, :count] = True
        if self.bias is not None:
            self.bias = pad(self.bias[..., : self.stored], (0, new))
        self.keys, self.values = keys, values
        self.seen += new
        self.came = self.came + torch.tensor(grown, device=self.came.device)
        self.received = self.queries = self.rotary = None  # nobody watched what these tokens asked

    def shared(self, heads: int) -> bool:
        """Whether :meth:`attend` pays: so many query heads share keys, and every thread has a head of these to read."""
        rows = math.prod(self.keys.shape[:2])
        return self.keys.shape[1] < heads and self.device.type == "cpu" and rows >= torch.get_num_threads()

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """What the newest token reads, ``(batch, heads, 1, dim)`` of its queries, where it may read every entry.

        Query heads that share keys are the rows of one product, which reads the keys once for all of them.
        """
        grouped = query.reshape(*self.keys.shape[:2], -1, query.shape[-1])
        return scaled_dot_product_attention(grouped, self.keys, self.values, scale=scaling).reshape(query.shape)

    def get_seq_length(self) -> int:
        return self.seen if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        stored = self.stored if self.is_initialized else 0
        return stored + query_length, self.seen - stored

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens (rejected drafts).

        Raises:
            ThriftError: a reduction has judged these tokens already, or counts the attention that they gave.
        """
        count = abs(tokens_to_remove)
        if count and (self.received is not None or (count > self.fresh and self.dropped)):
            raise ThriftError(
                f"{count} tokens cannot be taken back: the cache was reduced with them; "
                "leave out 'every' in the cache method, or generate without drafts"
            )
        self._crop(tokens_to_remove)
        if not count:
            return
        self.seen -= count
        self.came = self.came - count
        if self.real is not None:
            self.real = self.real[..., : self.stored]
        if self.bias is not None:
            self.bias = self.bias[..., : self.stored]
        if self.queries is not None:
            self.queries = self.queries[:, :, : max(self.queries.shape[2] - count, 0)]
        if self.rotary is not None:
            self.rotary = self.rotary.first(max(self.rotary.cos.shape[1] - count, 0))
        if self.fresh < 0:  # nothing was dropped: what is left maps to itself
            self.map = TokenMap.identity(self.seen, self.map.lead, self.map.device)

    def _crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.seen, self.whole = 0, True
        self.real = self.bias = self.received = self.queries = self.rotary = None
        self.came = torch.zeros_like(self.came[:1])
        self.map = TokenMap.identity(0, self.map.lead, self.map.device)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rows(lambda t: t[indices, ...])

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the rows of the batch in all that goes with the keys and values."""
        for name in ("real", "bias", "received", "queries", "came"):
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))
        if self.rotary is not None and self.rotary.cos.shape[0] > 1:
            cos, sin = (change(t) for t in (self.rotary.cos, self.rotary.sin))
            self.rotary = replace(self.rotary, cos=cos, sin=sin)
        edges = {f: getattr(self.map, f) for f in ("source", "target", "weight", "share", "anchor")}
        changed: dict[str, Any] = {f: None if t is None else change(t) for f, t in edges.items()}
        self.map = replace(self.map, **changed)


class RaggedLayer(ReducedLayer):
    """A reduced layer whose heads hold different numbers of entries, each only its own.

    The entries of all rows and heads lie one behind the other, ``(1, 1, slots, head_dim)``, with room behind each
    head's for the tokens to come. Attention sees keys and values padded to the longest head: these exist for one layer
    at a time, while it runs. Where they are few, single tokens are better answered head by head.

    Attributes:
        apart: the next token comes to be answered by :meth:`attend`: the next :meth:`update` returns that token only.
    """

    apart = False

    def __init__(
        self, keys: Tensor, values: Tensor, map: TokenMap, mask: Tensor, *, proportional: bool = False
    ) -> None:
        self._padded: dict[str, Tensor] = {}  # keys and values as others see them, as long as heads are alike
        self._flat: dict[str, Tensor] = {}  # the same once they are not
        self._lengths: list[int] = []  # of each head of each row, without what came later
        self._index = self._ends = torch.zeros(0, dtype=torch.int64)  # slots of what others see; behind each head's
        self._later = self._spare = 0  # of each head, tokens that came later, and its room for them
        self._holes = False  # whether some of these are padding
        super().__init__(keys, values, map, mask, proportional=proportional)

    @classmethod
    def of(cls, layer: ReducedLayer) -> RaggedLayer:
        """A layer that holds the same, and can be reduced to heads of different lengths."""
        n, lead, device = layer.stored, layer.map.lead, layer.map.device
        everything = torch.ones(lead[0], n, dtype=torch.bool, device=device)
        made = cls(layer.keys, layer.values, TokenMap.identity(n, lead, device), everything)
        same = "map", "real", "bias", "seen", "came", "whole", "received", "queries", "rotary", "proportional", "room"
        for name in same:
            setattr(made, name, getattr(layer, name))
        made._compact()
        return made

    def _keep(self, keys: Tensor, values: Tensor, map: TokenMap, real: Tensor) -> None:
        super()._keep(keys, values, map, real)
        self._compact()

    def _compact(self) -> None:
        """Let go of the padding between the heads."""
        if self.real is None:
            return
        slots, lengths = self.real.flatten(), self.real.sum(-1).flatten()
        self._flat = {name: getattr(self, name).flatten(0, -2)[slots][None, None] for name in ("keys", "values")}
        self._padded = {}
        self._lengths, self._ends = lengths.tolist(), lengths.cumsum(0)
        self._index = (slots.cumsum(0) - 1).clamp_(min=0).view(len(self._lengths), -1)  # padding reads anything
        self._later = self._spare = 0
        self._holes = False

    def _heads(self, name: str) -> list[Tensor]:
        """Of the keys or values those of each head, ``(1, 1, entries, head_dim)``: views."""
        sizes = [size for length in self._lengths for size in (length + self._later, self._spare - self._later)]
        return list(self._flat[name].split(sizes, dim=2))[::2]

    def _make_room(self, spare: int) -> None:
        """Move the heads apart: behind each there is room for so many later tokens."""
        for name, flat in self._flat.items():
            room = flat.new_zeros(1, 1, spare - self._later, flat.shape[-1])  # zeros: padding may read it
            self._flat[name] = torch.cat([part for head in self._heads(name) for part in (head, room)], dim=2)
        moved = torch.arange(len(self._lengths), device=self._ends.device) * (spare - self._spare)
        self._index, self._ends = self._index + moved[:, None], self._ends + moved
        self._spare = spare

    def _dense(self, name: str) -> Tensor | None:
        if name not in self._flat:
            return self._padded.get(name)
        index = self._index
        if self._later:
            later = torch.arange(self._later, device=index.device)
            index = torch.cat([index, self._ends[:, None] + later], dim=-1)
        return self._flat[name].index_select(2, index.flatten()).view(*self.map.lead, index.shape[-1], -1)

    def _hold(self, name: str, dense: Tensor | None) -> None:
        self._flat.pop(name, None)
        self._padded.pop(name, None)
        if dense is not None:
            self._padded[name] = dense

    keys = property(lambda self: self._dense("keys"), lambda self, t: self._hold("keys", t))  # type: ignore[assignment]
    values = property(lambda self: self._dense("values"), lambda self, t: self._hold("values", t))  # type: ignore[assignment]

    @property
    def stored(self) -> int:
        return self._index.shape[-1] + self._later if self._flat else int(self.keys.shape[-2])

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in (*self._flat.values(), *self._padded.values()))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self._flat:
            return super().update(key_states, value_states)
        new = key_states.shape[-2]
        self._count(new)
        if self._later + new > self._spare:
            self._make_room(self._later + new + room_for(max(self._lengths), self.room))
        at = self._ends + self._later
        if new > 1:
            at = (at[:, None] + torch.arange(new, device=at.device)).flatten()
        for name, states in (("keys", key_states), ("values", value_states)):
            flat, rows = self._flat[name], states.reshape(1, 1, -1, states.shape[-1])
            needed = torch.is_grad_enabled() and (flat.requires_grad or rows.requires_grad)  # by a backward pass
            copy = flat.index_copy if needed or is_locked(flat) else flat.index_copy_
            self._flat[name] = copy(2, at, rows)
        self._later += new
        apart, self.apart = self.apart, False  # of this call only, also when it is interrupted after this
        return (key_states, value_states) if apart else (self.keys, self.values)

    @property
    def few(self) -> bool:
        """Whether attention head by head is faster than with padding, and possible: no later token is padding."""
        return math.prod(self.map.lead) <= FEW and self.device.type == "cpu" and bool(self._flat) and not self._holes

    def shared(self, heads: int) -> bool:
        """No: what all heads hold is no single tensor."""
        return False

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """What the newest token reads: ``(batch, heads, 1, dim)`` of its queries, without any padding."""
        grouped = query.reshape(len(self._lengths), 1, 1, -1, query.shape[-1])  # a row for each key/value head
        bias: list[Tensor | None] = [None] * len(self._lengths)
        if self.bias is not None:
            held = zip(self.bias.flatten(0, 1), self.held.flatten(0, 1), strict=True)
            bias = [of[real][None, None, None].to(query.dtype) for of, real in held]
        heads = zip(grouped, self._heads("keys"), self._heads("values"), bias, strict=True)
        out = [scaled_dot_product_attention(q, k, v, attn_mask=b, scale=scaling) for q, k, v, b in heads]
        return torch.cat(out).reshape(query.shape)

    def hide(self, new: Tensor) -> None:
        super().hide(new)
        self._holes = self._holes or not bool(new.all())

    def _crop(self, tokens_to_remove: int) -> None:
        if self._flat and abs(tokens_to_remove) <= self._later:
            self._later -= abs(tokens_to_remove)
        else:
            super()._crop(tokens_to_remove)

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._rows(change)
        self._compact()


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


def _padding_first(map: TokenMap) -> TokenMap:
    """The same map with the padding of its shorter rows in front of their outputs."""
    if not map.padded:
        return map
    order = map.mask.to(torch.uint8).argsort(dim=-1, stable=True)
    return map.then(TokenMap.select(torch.where(map.mask.gather(-1, order), order, -1), map.n_out))
