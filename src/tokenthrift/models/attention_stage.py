"""The attention stage of decoder-only models: the cache keeps everything, a decoding step reads a selection of it.

Prefill is dense. At every later step of one token a method looks at a layer's query and keys and names the entries to
read; layers where it names none, and layers with a sliding window, attend as the model does. The cache's layers are
replaced by ones that append in place, since copying all entries at every step costs more than attending to them.
"""

from __future__ import annotations

from contextlib import ExitStack
from time import perf_counter
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..core.costs import attention_flops
from ..core.errors import ThriftError
from ..core.session import Session
from ..core.view import Lazy, View
from ..ops.gathered import gathered_attention
from .attention import Run, cache_among, real_tokens, replace_attention
from .growing import GrowingLayer
from .kv import ReducedLayer
from .layer_kinds import check_kinds
from .replacing import note_calls

if TYPE_CHECKING:
    from .decoder import DecoderAdapter


def install_attention(adapter: DecoderAdapter, method: Any, session: Session, undo: ExitStack) -> None:
    """Let ``method`` select what decoding steps read, until ``undo`` closes.

    A method that has to know something of the model beforehand has ``bind``: given the model, the method to use.

    Raises:
        ThriftError: the plan also has a cache or decode stage, a layer keeps something else than keys and values, or
            every layer has a sliding window; what ``bind`` raises.
    """
    if session.plan.at("cache"):
        raise ThriftError(
            "cache= and attention= cannot be combined: the first keeps few entries, the second all of them, to read few"
        )
    if session.plan.at("decode"):
        raise ThriftError(
            "decode= and attention= cannot be combined: a forward that verifies drafts reads the whole cache, so its "
            "tokens would not be those of selective attention"
        )
    check_kinds(adapter.model, f"attention={method.info.name}", states=True)
    layers = DynamicCache(config=adapter.model.config).layers
    full = [  # some models' last layers have no place in the cache: they read another's
        m
        for m in adapter.attentions
        if (i := int(m.layer_idx)) < len(layers) and not getattr(layers[i], "is_sliding", False)  # type: ignore[arg-type]
    ]
    if not full:
        raise ThriftError(
            f"every layer of {type(adapter.model).__name__} has a sliding window: the attention stage has nothing to "
            "select from"
        )
    bound = method.bind(adapter.model) if hasattr(method, "bind") else method
    common = Common(adapter, bound, session, len(full))
    number = {id(module): i for i, module in enumerate(full)}

    def make(module: nn.Module) -> Selecting:
        selecting = Selecting(module, number[id(module)], common)
        # The attention function is not told the cache: note it as the module is called.
        note_calls(module, selecting.note_call, undo)
        return selecting

    replace_attention(full, make, undo)


class Common:
    """What the layers of a model share while a method selects for them."""

    def __init__(self, adapter: DecoderAdapter, method: Any, session: Session, layers: int) -> None:
        self.adapter, self.method, self.session, self.layers = adapter, method, session, layers
        self._shared: WeakKeyDictionary[Cache, dict[str, Any]] = WeakKeyDictionary()
        self._mask: tuple[Tensor, Tensor | None] | None = None

    def shared(self, cache: Cache) -> dict[str, Any]:
        """What a method hands from layer to layer, as long as the cache lives."""
        return self._shared.setdefault(cache, {})

    def real(self, mask: Tensor | None) -> Tensor | None:
        """``(batch, n)`` bool, false for padding, from the 4-D mask of one query; None if there is no padding.

        The layers of a forward get the same mask, so it is looked at once.
        """
        if mask is None:
            return None
        if self._mask is None or self._mask[0] is not mask:
            row = real_tokens(mask)
            self._mask = mask, None if bool(row.all()) else row
        return self._mask[1]


class Selecting:
    """Answers one layer's attention calls."""

    def __init__(self, module: nn.Module, number: int, common: Common) -> None:
        self.index, self.number, self.common = int(module.layer_idx), number, common  # type: ignore[arg-type]
        self.cache: Cache | None = None

    def note_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Of a call of the attention module: which cache it reads, which then gets a layer with room."""
        self.cache = cache_among(args, kwargs)
        layer = self._layer(self.cache)
        if self.cache is None:
            return
        if type(layer) is DynamicLayer:
            self.cache.layers[self.index] = GrowingLayer(layer)
        elif isinstance(layer, ReducedLayer):
            if layer.get_seq_length():
                raise ThriftError(
                    f"layer {self.index} of this cache was reduced by a cache method: "
                    "read the prompt anew, with an empty cache, for the attention stage"
                )
            self.cache.layers[self.index] = GrowingLayer()  # it was reset: nothing is left of the reduction

    def __call__(
        self, run: Run, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        cache, self.cache = self.cache, None  # hold no reference between calls
        layer = self._layer(cache)
        if cache is None or layer is None or query.shape[-2] != 1:
            return run(query, key, value, mask)
        if not isinstance(layer, GrowingLayer):
            raise ThriftError(
                f"layer {self.index} caches in a {type(layer).__name__}, which cannot be read in part; "
                "use the default cache (no cache_implementation, no quantized or offloaded cache)"
            )
        common, n = self.common, key.shape[-2]
        start = perf_counter()
        real = common.real(mask)
        indices = common.method.select(self._view(cache, layer, query, real, scaling))
        if indices is None or indices.shape[-1] >= n:
            self._record(key, value, real, None, perf_counter() - start)
            return run(query, key, value, mask)
        if run.exotic:
            raise ThriftError(
                f"layer {self.index} attends with {run.exotic}, which reading selected entries cannot reproduce"
            )
        seen = None if real is None else real.unsqueeze(1).expand(-1, indices.shape[1], -1).gather(-1, indices)
        self._record(key, value, real, indices if seen is None else seen, perf_counter() - start)
        return gathered_attention(query, key, value, indices, scaling, seen)

    def _view(self, cache: Cache, layer: GrowingLayer, query: Tensor, real: Tensor | None, scaling: float) -> View:
        return View(
            queries=query,
            keys=layer.keys,
            values=layer.values,
            scaling=scaling,
            mask=real,
            layer=self.number,
            layers=self.common.layers,
            memory=layer.memory,
            shared=Lazy(lambda: self.common.shared(cache)),
        ).require(self.common.method.info.needs)

    def _record(self, key: Tensor, value: Tensor, real: Tensor | None, read: Tensor | None, seconds: float) -> None:
        """Count real entries stored and read, per key/value head (a query head's own selection counts in part)."""
        batch, kv_heads, n = key.shape[:3]
        before = after = kv_heads * (batch * n if real is None else int(real.sum()))
        if read is not None:
            count = read.numel() if read.dtype != torch.bool else int(read.sum())
            after = count * kv_heads // read.shape[1]
            costs = self.common.adapter.costs
            spared = (before - after) // kv_heads
            self.common.session.flops -= attention_flops(1, spared, costs.heads, costs.head_dim)
        width = key.shape[-1] * key.element_size() + value.shape[-1] * value.element_size()
        self.common.session.record(
            "attention",
            before=before,
            after=after,
            bytes_before=before * width,
            bytes_after=after * width,
            seconds=seconds,
        )

    def _layer(self, cache: Cache | None) -> Any:
        layers = [] if cache is None else cache.layers
        return layers[self.index] if self.index < len(layers) else None
