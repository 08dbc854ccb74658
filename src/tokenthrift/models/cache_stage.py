"""The cache stage of decoder-only models: reduce each layer's keys and values right after its own prefill attention.

Compressing layer by layer keeps the peak at one full layer beside the compressed ones: ``prompt + (layers - 1) *
budget`` entries a head. The method sees a lazy view and returns a TokenMap over ``(batch, kv_heads)``; what it drops is
freed. Methods with an ``every`` reduce what is stored again as the text grows, so that the cache stays within their
budget: a prompt in chunks of at least ``every`` tokens peaks at ``layers * budget + chunk``. Sliding-window layers are
left alone: they hold a window only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..core.errors import ThriftError
from ..core.session import Session
from ..core.tokenmap import TokenMap
from ..core.view import Lazy, View
from ..ops.attention import attention_received, attention_rows, group_mean
from ..ops.rotary import Rotary
from .attention import Watcher, cache_among, is_exotic, is_replaced, real_tokens, watch_attention
from .growing import GrowingLayer
from .kv import RaggedLayer, ReducedLayer, biased, reduced_layer
from .layer_kinds import check_kinds
from .lookahead import Lookahead
from .replacing import note_calls
from .rotary import rotary_of

if TYPE_CHECKING:
    from .decoder import DecoderAdapter


def install_cache(adapter: DecoderAdapter, method: Any, session: Session, undo: ExitStack) -> None:
    """Compress caches with ``method`` after the first prompt forward, and as it asks later, until ``undo`` closes.

    A method that has to know something of the model beforehand has ``bind``: given the model, the method to use. Where
    that has ``draft``, prompts run together with the tokens that it gives; see :mod:`tokenthrift.models.lookahead`.

    Raises:
        ThriftError: a layer keeps something else than keys and values, or every layer has a sliding window, so there is
            nothing to reduce; the method goes on reducing while drafts may still be taken back; what ``bind`` raises.
    """
    check_kinds(adapter.model, f"cache={method.info.name}", states=True)
    if getattr(method, "every", 0) and "decode" in session.plan.stages:
        raise ThriftError(
            f"{method.info.name}(every={method.every}) cannot run beside a decode stage, which may take tokens back: "
            "leave out 'every', or the decode stage"
        )
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
        note_calls(module, watcher.note_call, undo)
        return watcher

    watch_attention(adapter.attentions, make, undo)
    if lookahead is not None:
        lookahead.install(undo)


class CacheWatcher(Watcher):
    """One attention layer: supplies masks that fit a reduced cache, and reduces it.

    That is after the first forward of the prompt, and, where the method says so (``every``), again whenever so many
    tokens have come since.
    """

    def __init__(
        self, module: nn.Module, layers: int, method: Any, session: Session, lookahead: Lookahead | None = None
    ) -> None:
        self.module, self.layer, self.layers = module, int(module.layer_idx), layers  # type: ignore[arg-type]
        self.fused = module.config._attn_implementation.endswith("sdpa")  # type: ignore[union-attr, operator]
        self.method, self.session, self.lookahead = method, session, lookahead
        self.every = int(getattr(method, "every", 0))
        self.lookback = int(getattr(method, "lookback", 0)) if self.every else 0
        # A method that asks another one for scores reads what that one does.
        self.needs = {*method.info.needs, *getattr(method, "reads", ())}
        self.rotates = "rotary" in self.needs
        self.counts = self.every > 0 and "received" in self.needs
        self.cache: Cache | None = None
        self.rotary: Callable[[], Rotary] | None = None
        self.prompt = self.apart = self.grouped = False

    def note_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Of a call of the attention module: its rotation, which cache it fills, and whether that was empty.

        It runs once a layer and token: what it does slowly is felt.
        """
        self.apart = self.grouped = False
        if self.lookahead is not None and self.lookahead.drafting:
            self.cache = None
            return
        if self.rotates:
            self.rotary = partial(rotary_of, self.module, kwargs.get("position_embeddings"))
        self.cache = cache_among(args, kwargs)
        stored = self._stored()
        self.prompt = self.cache is not None and (stored is None or int(stored.get_seq_length()) == 0)
        if isinstance(stored, RaggedLayer) and not self.counts:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self.apart = hidden.shape[1] == 1 and self._plain and stored.few
            stored.apart = self.apart

    @property
    def _plain(self) -> bool:
        """Whether what the module computes is softmax attention, and nobody else answers it."""
        return not is_exotic(self.module) and not is_replaced(self.module)

    def answer(self, query: Tensor, scaling: float) -> Tensor | None:
        return self._stored().attend(query, scaling) if self.apart or self.grouped else None

    def before(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
        stored, new = self._stored(), query.shape[-2]
        if not isinstance(stored, ReducedLayer) or self.prompt or self.apart:
            return mask
        if new > 1 and mask is not None:  # a prompt that comes in parts: its padding is nothing to read later
            stored.hide(real_tokens(mask)[:, -new:].expand(query.shape[0], -1))
        fits = mask is None or mask.shape[-1] == key.shape[-2]
        if stored.whole and fits:
            return mask
        mask = reduced_mask(stored, query, mask)
        self.grouped = new == 1 and mask is None and self.fused and stored.shared(query.shape[1]) and self._plain
        return mask

    def after(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> None:
        stored, cache, rotary = self._stored(), self.cache, self.rotary
        self.cache = self.rotary = None  # hold no reference between calls
        first = self.prompt and (query.shape[-2] > 1 or self.every > 0)
        if cache is None or not (first or self.every):
            return
        ahead = 0 if self.lookahead is None else self.lookahead.tokens
        if getattr(stored, "is_sliding", False):
            if ahead and self.lookahead is not None:
                self.lookahead.mend(stored, key, value)
            return
        # A cache that an earlier session filled has layers of that session's kind, also when it was reset since.
        if type(stored) not in (DynamicLayer, GrowingLayer, ReducedLayer, RaggedLayer):
            raise ThriftError(
                f"layer {self.layer} caches in a {type(stored).__name__}, which cannot be reduced; "
                "use the default cache (no cache_implementation, no quantized or offloaded cache)"
            )
        start = perf_counter()
        if first:
            view = cache_view(query, key, value, mask, scaling, self.layer, self.layers, rotary, ahead)
            key, value = view.keys, view.values
            map = self.method.reduce(view.require(self.method.info.needs))
            proportional = getattr(self.method, "proportional", False)
            layer = cache.layers[self.layer] = reduced_layer(key, value, map, view.mask, proportional=proportional)
            if self.lookback:
                layer.queries = view.queries[:, :, -self.lookback :].clone()
                layer.rotary = view.rotary.last(self.lookback) if self.rotates else None
            layer.received = layer.map.sizes(view.received) if self.counts else None
            layer.room = self.every or None  # it is reduced before more than these come
            self.session.record(
                "cache",
                before=int(view.mask.sum()) * map.lead[-1],
                after=layer.entries,
                bytes_before=key.nbytes + value.nbytes,
                bytes_after=layer.nbytes,
                seconds=perf_counter() - start,
            )
            self.session.add_map("cache", layer.map, self.layer)
            view.forget()
            return
        if not isinstance(stored, ReducedLayer):  # filled before this session
            everything = TokenMap.identity(key.shape[-2], key.shape[:2], key.device)
            real = key.new_ones(key.shape[0], key.shape[-2]).bool() if mask is None else real_tokens(mask)
            old = key.shape[-2] - query.shape[-2]
            stored = cache.layers[self.layer] = ReducedLayer(key, value, everything, real.expand(key.shape[0], -1))
            stored.map, stored.room = TokenMap.identity(old, key.shape[:2], key.device), self.every
        self._follow(stored, query, key, scaling, rotary)
        if stored.fresh >= self.every:
            self._again(cache, stored, scaling, start)

    def _follow(
        self, layer: ReducedLayer, query: Tensor, key: Tensor, scaling: float, rotary: Callable[[], Rotary] | None
    ) -> None:
        """Note of new tokens what later reductions will ask for."""
        if self.lookback:
            known = query if layer.queries is None else torch.cat([layer.queries, query], dim=2)
            layer.queries = known[:, :, -self.lookback :].clone()
            if self.rotates and rotary is not None:
                turned = rotary()
                layer.rotary = (turned if layer.rotary is None else layer.rotary.then(turned)).last(self.lookback)
        if self.counts:
            if layer.received is None:
                raise ThriftError(
                    f"{self.method.info.name} counts the attention that entries receive, and this cache was filled "
                    "without it: read the prompt inside the same with block"
                )
            asking, keys = _heads_as_rows(query, key)
            new = attention_received(asking, keys, scaling, layer.held.flatten(0, 1))
            received = pad(layer.received, (0, query.shape[-2]))
            layer.received = received + group_mean(new, 1).view_as(received)

    def _again(self, cache: Cache, layer: ReducedLayer, scaling: float, start: float) -> None:
        before, held = layer.entries, layer.nbytes
        view = stored_view(layer, scaling, self.layer, self.layers)
        map = self.method.reduce(view.require(self.method.info.needs))
        lengths = map.mask.sum(-1)
        if not isinstance(layer, RaggedLayer) and bool((lengths != lengths[:, :1]).any()):
            layer = cache.layers[self.layer] = RaggedLayer.of(layer)
        view.forget()
        layer.reduce(map)
        record = self.session.record("cache", before=0, after=0, seconds=perf_counter() - start)
        for name, value in (("reduced_again", 1), ("then_dropped", before - layer.entries)):
            record.extra[name] = record.extra.get(name, 0) + value
        record.extra["most_bytes_a_layer"] = max(record.extra.get("most_bytes_a_layer", 0), held)
        self.session.add_map("cache", layer.map, self.layer)

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
        return real_tokens(mask).expand(batch, width)

    def received() -> Tensor:
        return group_mean(attention_received(query[:, :, :n], key[:, :, :n], scaling, view.mask), key.shape[1])

    view = View(
        keys=key[:, :, :n],
        values=value[:, :, :n],
        queries=query[:, :, :n],
        scaling=scaling,
        ahead=ahead,
        mask=Lazy(lambda: real()[:, :n]),
        positions=Lazy(lambda: torch.arange(n, device=key.device).expand(batch, n)),
        protected=Lazy(lambda: torch.zeros(batch, n, dtype=torch.bool, device=key.device)),
        received=Lazy(received),
        asked=Lazy(lambda: torch.arange(n, 0, -1, device=key.device).expand(*key.shape[:2], n)),
        again=False,
        seen=Lazy(lambda: view.mask.sum(-1)),
        layer=layer,
        layers=layers,
    )
    if rotary is not None:
        view.offer("rotary", Lazy(lambda: rotary().first(n)))
    view.offer("attention", lambda rows: attention_rows(query[:, :, -rows:], key, scaling, real()))
    return view


def stored_view(layer: ReducedLayer, scaling: float, index: int, layers: int) -> View:
    """What a cache method may look at when it reduces what is stored once more: see :func:`cache_view`.

    Columns are entries, not tokens of the text. ``view.attention(rows)`` has fewer rows where fewer queries are known.
    """
    batch, _, n, _ = (keys := layer.keys).shape

    def by_head() -> View:
        """Heads are rows, so that each has its own padding."""
        rows = View(
            keys=keys.flatten(0, 1).unsqueeze(1),
            values=Lazy(lambda: layer.values.flatten(0, 1).unsqueeze(1)),
            mask=layer.held.flatten(0, 1),
            asked=Lazy(lambda: view.asked.flatten(0, 1).unsqueeze(1)),
            seen=layer.came.repeat_interleave(keys.shape[1]),
            scaling=scaling,
            again=True,
            layer=index,
            layers=layers,
        )
        if layer.rotary is not None:
            rows.offer("rotary", layer.rotary.repeated(keys.shape[1]))
        if layer.received is not None:
            rows.offer("received", layer.received.flatten(0, 1).unsqueeze(1))
        if layer.queries is not None:
            asking, _ = _heads_as_rows(layer.queries, keys)
            rows.offer("queries", asking)
            rows.offer("attention", lambda count: _last_rows(asking, count, rows.keys, rows))
        return rows

    view = View(
        keys=keys,
        values=Lazy(lambda: layer.values),
        scaling=scaling,
        mask=Lazy(lambda: real_entries(layer)),
        protected=Lazy(lambda: torch.zeros(batch, n, dtype=torch.bool, device=keys.device)),
        asked=Lazy(lambda: layer.seen - layer.positions),
        again=True,
        seen=layer.came,
        sizes=Lazy(lambda: torch.ones(layer.held.shape, device=keys.device) if (b := layer.bias) is None else b.exp()),
        by_head=Lazy(by_head),
        layer=index,
        layers=layers,
    )
    if layer.received is not None:
        view.offer("received", layer.received)
    if layer.queries is not None:
        view.offer("queries", layer.queries)
    if layer.rotary is not None:
        view.offer("rotary", layer.rotary)
    view.offer("attention", lambda rows: _last_rows(layer.queries, rows, keys, view))
    return view


def _last_rows(queries: Tensor | None, rows: int, keys: Tensor, view: View) -> Tensor:
    assert queries is not None, "a method that reads attention here says with 'lookback' how many rows"
    return attention_rows(queries[:, :, -rows:], keys, view.scaling, view.mask)


def _heads_as_rows(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """``(batch · kv_heads, group, q, dim)`` and ``(batch · kv_heads, 1, n, dim)``."""
    return queries.unflatten(1, (keys.shape[1], -1)).flatten(0, 1), keys.flatten(0, 1).unsqueeze(1)


def real_entries(layer: ReducedLayer) -> Tensor:
    """``(batch, stored)`` bool, for layers whose heads all hold equally many entries.

    Raises:
        ThriftError: they do not.
    """
    if layer.real is None:
        return torch.ones(layer.map.lead[0], layer.stored, dtype=torch.bool, device=layer.device)
    if bool((layer.real != layer.real[:, :1]).any()):
        raise ThriftError(
            "the heads of this cache hold different numbers of entries, which no method can reduce again: "
            "leave out 'every', or begin with an empty cache"
        )
    return layer.real[:, 0]


def reduced_mask(layer: ReducedLayer, query: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask for queries over a reduced layer: stored entries that are real, then causal among the new tokens.

    ``mask`` is the model's, built for some other length; only its last columns, for the new tokens, are right (they
    hold padding and tree masks). Returns ``(batch, heads or 1, q, stored)``, None if everything is seen; additive where
    ``mask`` is, and where entries count for several tokens.
    """
    q, stored = query.shape[-2], layer.stored
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
