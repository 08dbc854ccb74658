"""The cache stage of decoder-only models: reduce each layer's keys and values right after its own prefill attention.

Compressing layer by layer keeps the peak at one full layer beside the compressed ones. The method sees a lazy view and
returns a TokenMap over ``(batch, kv_heads)``; what it drops is freed. Sliding-window layers are left alone: they hold a
window only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..core.errors import ThriftError
from ..core.session import Session
from ..core.view import Lazy, View
from ..ops.attention import attention_rows
from ..ops.rotary import Rotary
from .attention import watch_attention
from .kv import ReducedLayer, biased
from .lookahead import Lookahead
from .rotary import rotary_of

if TYPE_CHECKING:
    from .decoder import DecoderAdapter


def install_cache(adapter: DecoderAdapter, method: Any, session: Session, undo: ExitStack) -> None:
    """Compress caches with ``method`` after the first prompt forward, until ``undo`` closes.

    A method that has to know something of the model beforehand has ``bind``: given the model, the method to use. Where
    that has ``draft``, prompts run together with the tokens that it gives; see :mod:`tokenthrift.models.lookahead`.

    Raises:
        ThriftError: every layer has a sliding window, so there is nothing to reduce; what ``bind`` raises.
    """
    layers = DynamicCache(config=adapter.model.config).layers
    if all(getattr(layer, "is_sliding", False) for layer in layers):
        raise ThriftError(
            f"every layer of {type(adapter.model).__name__} has a sliding window of {layers[0].sliding_window} tokens: "
            "the cache stage has nothing to reduce"
        )

    bound = method.bind(adapter.model) if hasattr(method, "bind") else method
    lookahead = Lookahead(bound, adapter, session) if hasattr(bound, "draft") else None

    def make(module: nn.Module) -> CacheWatcher:
        watcher = CacheWatcher(module, len(adapter.attentions), bound, session, lookahead)
        # The attention function is told neither the cache nor the rotation: note them as the module is called.
        handle = module.register_forward_pre_hook(watcher.note_call, with_kwargs=True)
        undo.callback(handle.remove)
        return watcher

    watch_attention(adapter.attentions, make, undo)
    if lookahead is not None:
        lookahead.install(undo)


class CacheWatcher:
    """One attention layer: supplies masks that fit a reduced cache, and reduces it once, after the first prompt."""

    def __init__(
        self, module: nn.Module, layers: int, method: Any, session: Session, lookahead: Lookahead | None = None
    ) -> None:
        self.layer, self.layers = int(module.layer_idx), layers  # type: ignore[arg-type]
        self.method, self.session, self.lookahead = method, session, lookahead
        self.cache: Cache | None = None
        self.rotary: Callable[[], Rotary] | None = None
        self.prompt = False

    def note_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the attention module: its rotation, which cache it fills, and whether that was empty."""
        if self.lookahead is not None and self.lookahead.drafting:
            self.cache = None
            return
        self.rotary = partial(rotary_of, module, kwargs.get("position_embeddings"))
        self.cache = next((v for v in (*kwargs.values(), *args) if isinstance(v, Cache)), None)
        self.prompt = self.cache is not None and int(self.cache.get_seq_length(self.layer)) == 0

    def before(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
        stored = self._stored()
        fits = mask is None or mask.shape[-1] == key.shape[-2]
        if not isinstance(stored, ReducedLayer) or (stored.whole and fits):
            return mask
        return reduced_mask(stored, query, mask)

    def after(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> None:
        stored, cache, rotary = self._stored(), self.cache, self.rotary
        self.cache = self.rotary = None  # hold no reference between calls
        ahead = 0 if self.lookahead is None or cache is None else self.lookahead.tokens
        if ahead and self.lookahead is not None and getattr(stored, "is_sliding", False):
            self.lookahead.mend(stored, key, value)
        if cache is None or not self.prompt or query.shape[-2] == 1 or getattr(stored, "is_sliding", False):
            return
        if type(stored) not in (DynamicLayer, ReducedLayer):  # a reset cache keeps its reduced layers, empty
            raise ThriftError(
                f"layer {self.layer} caches in a {type(stored).__name__}, which cannot be reduced; "
                "use the default cache (no cache_implementation, no quantized or offloaded cache)"
            )
        start = perf_counter()
        view = cache_view(query, key, value, mask, scaling, self.layer, self.layers, rotary, ahead)
        key, value = view.keys, view.values
        map = self.method.reduce(view.require(self.method.info.needs))
        proportional = getattr(self.method, "proportional", False)
        reduced = ReducedLayer(key, value, map, view.mask, proportional=proportional)
        cache.layers[self.layer] = reduced
        seconds = perf_counter() - start
        heads = map.lead[-1]
        self.session.record(
            "cache",
            before=int(view.mask.sum()) * heads,
            after=reduced.entries,
            bytes_before=key.nbytes + value.nbytes,
            bytes_after=reduced.keys.nbytes + reduced.values.nbytes,
            seconds=seconds,
        )
        self.session.add_map("cache", map, self.layer)

    def _stored(self) -> Any:
        layers = [] if self.cache is None else self.cache.layers
        return layers[self.layer] if self.layer < len(layers) else None


def cache_view(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    layer: int,
    layers: int,
    rotary: Callable[[], Rotary] | None = None,
    ahead: int = 0,
) -> View:
    """What a cache method may look at, at the end of one layer's prefill.

    Shapes: ``query`` ``(batch, heads, n, dim)``, ``key`` and ``value`` ``(batch, kv_heads, n, dim)`` after RoPE,
    ``mask`` the model's 4-D mask or None, ``rotary`` a function that gives the rotation, if there may be one.
    ``view.attention(rows)`` gives the attention of the last ``rows`` queries. The last ``ahead`` tokens are no part of
    the prompt: they only ask, as the last rows of attention, over themselves too; all else is of the prompt.
    """
    batch, width = key.shape[0], key.shape[-2]
    n = width - ahead

    def real() -> Tensor:
        if mask is None:
            return torch.ones(batch, width, dtype=torch.bool, device=key.device)
        last = mask[:, 0, -1, :]  # the last prompt token sees every real token
        return (last if last.dtype == torch.bool else last == 0).expand(batch, width)

    view = View(
        keys=key[:, :, :n],
        values=value[:, :, :n],
        queries=query[:, :, :n],
        scaling=scaling,
        ahead=ahead,
        mask=Lazy(lambda: real()[:, :n]),
        positions=Lazy(lambda: torch.arange(n, device=key.device).expand(batch, n)),
        protected=Lazy(lambda: torch.zeros(batch, n, dtype=torch.bool, device=key.device)),
        layer=layer,
        layers=layers,
    )
    if rotary is not None:
        view.offer("rotary", Lazy(lambda: rotary().first(n)))
    view.offer("attention", lambda rows: attention_rows(query[:, :, -rows:], key, scaling, real()))
    return view


def reduced_mask(layer: ReducedLayer, query: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask for queries over a reduced layer: stored entries that are real, then causal among the new tokens.

    ``mask`` is the model's, built for some other length; only its last columns, for the new tokens, are right (they
    hold padding and tree masks). Returns ``(batch, heads or 1, q, stored)``, None if everything is seen; additive where
    ``mask`` is, and where entries count for several tokens.
    """
    q, stored = query.shape[-2], layer.keys.shape[-2]
    if layer.real is None and layer.bias is None and q == 1:
        return None
    additive = layer.bias is not None or (mask is not None and mask.dtype != torch.bool)
    if mask is None:
        new = torch.ones(q, q, dtype=torch.bool, device=query.device).tril()[None, None]
    else:
        new = mask[..., -q:] if mask.dtype == torch.bool else mask[..., -q:] >= 0
    if layer.real is None:
        old = torch.ones(*new.shape[:-1], stored - q, dtype=torch.bool, device=query.device)
    else:
        groups = query.shape[1] // layer.real.shape[1]
        old = layer.real[..., : stored - q].repeat_interleave(groups, dim=1).unsqueeze(-2)
    batch, heads = query.shape[0], max(old.shape[1], new.shape[1])
    seen = torch.cat([old.expand(batch, heads, q, -1), new.expand(batch, heads, -1, -1)], dim=-1)
    if not additive:
        return seen
    return biased(seen, layer.bias, query.shape[1], query.dtype)
