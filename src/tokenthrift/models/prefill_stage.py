"""The prefill stage of decoder-only models: compute less of the prompt, in the user's own calls.

The model gets a ``forward`` of its own while a session lasts. It recognises a prompt (several tokens, an empty cache)
and hands it to the runtime of the method's ``place``:

- ``"rows"``: prompts are rearranged, none of them is cut (:mod:`.prepacking`);
- ``"heads"``: in the attention of some layers, each head leaves tokens out;
- ``"blocks"``: in the attention of the layers without a window, each block of queries reads some of the keys;
- ``"layers"``: after some layers, tokens are left behind (:mod:`.lazy_stage`);
- ``"cascade"``: after some layers, tokens and heads are dropped, or visual tokens only (:mod:`.cascade_stage`);
- ``"prompt"``: some tokens are kept, and the model reads these as a shorter prompt (:mod:`.shortened`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import cache, partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..core.costs import attention_flops
from ..core.errors import ThriftError
from ..core.session import Session
from ..core.tokenmap import TokenMap
from ..core.view import Lazy, View
from ..ops.attention import attend_selected, attention_rows
from ..ops.chunk_attention import attend_reads
from .attention import Attend, Run, Watcher, replace_attention, watching_instead
from .cascade_stage import install_cascade
from .draft_attention import draft_attention, draft_for
from .growing import GrowingLayer
from .layer_kinds import check_kinds
from .lazy_stage import install_lazy
from .prepacking import check_packable, fill, prefill_rows
from .replacing import replace_method
from .shortened import ShortenedCache, shorten

if TYPE_CHECKING:
    from .decoder import DecoderAdapter

PLAIN = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict")
"""What a prompt's forward may be given to be answered without the model's own."""

Call = dict[str, Any]
Forward = Callable[..., Any]
Runtime = Callable[[Call, Tensor, Forward], Any]
"""Answers a prompt, given the call, ``(batch, tokens)`` bool for its real tokens, and the model's own forward."""


def install_prefill(adapter: DecoderAdapter, method: Any, session: Session, undo: ExitStack) -> None:
    """Answer prompts with ``method`` until ``undo`` closes.

    Raises:
        ThriftError: a method that the model, or another stage of the plan, has no room for; a layer that keeps
            something else than keys and values.
    """
    stages, name = session.plan.stages, method.info.name
    check_kinds(adapter.model, f"prefill={name}", states=method.place == "heads")
    if method.place == "rows":
        check_packable(adapter)
        if "cache" in stages:
            raise ThriftError(f"prefill={name} fills the cache by itself: take it or the cache stage, not both")
        runtime: Runtime = partial(_pack, adapter, method, session)
    elif method.place == "heads":
        _check_plain_attention(adapter, name)
        method.sparse_layers(len(adapter.attentions))  # refuses layers that are not there
        runtime = partial(_thin_out, adapter, method, session)
    elif method.place == "blocks":
        _check_plain_attention(adapter, name)
        if not _full_layers(adapter):
            raise ThriftError(f"every layer of {type(adapter.model).__name__} has a window: {name} has nothing to do")
        runtime = partial(_read_sparsely, adapter, method, session)
    elif method.place == "layers":
        if {"cache", "decode"} & set(stages):
            raise ThriftError(f"prefill={name} has a cache of its own kind: leave out cache=... and decode=...")
        runtime = partial(_go_lazily, adapter, session, install_lazy(adapter, method, session, undo))
    elif method.place == "cascade":
        if {"cache", "attention", "decode"} & set(stages):
            raise ThriftError(
                f"prefill={name} decides what the cache holds: leave out cache=..., attention=... and decode=..."
            )
        if getattr(method, "own_attention", False):
            _check_plain_attention(adapter, name)
        runtime = partial(_go_down, adapter, session, install_cascade(adapter, method, session, undo))
    else:
        if "decode" in stages:
            raise ThriftError(f"drafts cannot be verified over a prompt that {name} shortened: leave out decode=...")
        runtime = partial(_shorten, adapter, method, session)
        _scoring_layer(adapter, method)  # refuses layers that are not there
    # Visual tokens come as embeddings among those of the text.
    _replace_forward(adapter, runtime, session, undo, embeds="visual" in method.info.needs)


def _replace_forward(
    adapter: DecoderAdapter, runtime: Runtime, session: Session, undo: ExitStack, *, embeds: bool
) -> None:
    model = adapter.model
    signature = inspect.signature(model.forward)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

    def forward(plain: Forward, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        more = given.pop(rest, {})
        call: Call = {k: v for k, v in {**given, **more}.items() if v is not None}
        held = call.get("past_key_values")
        if isinstance(held, ShortenedCache):
            return _go_on(adapter, session, held, call, plain)
        real = _prompt_of(call, embeds)
        return plain(*args, **kwargs) if real is None else runtime(call, real, plain)

    replace_method(model, "forward", forward, undo)


def _prompt_of(call: Call, embeds: bool = False) -> Tensor | None:
    """Which tokens of a prompt are real; None where the call is none, or trains.

    Args:
        embeds: prompts of embeddings are prompts too.
    """
    ids, mask, held = (call.get(k) for k in ("input_ids", "attention_mask", "past_key_values"))
    if "inputs_embeds" in call:
        ids = call["inputs_embeds"][..., 0] if embeds else None
    if ids is None or ids.shape[1] < 2 or "labels" in call:
        return None
    if held is not None and int(held.get_seq_length()) > 0:
        return None
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.shape != ids.shape:
        return None
    real: Tensor = mask.bool()
    return real if bool((real[:, 1:] >= real[:, :-1]).all()) and bool(real[:, -1].all()) else None


def _wants_cache(adapter: DecoderAdapter, call: Call) -> bool:
    config = adapter.model.config.get_text_config(decoder=True)
    return bool(call.get("use_cache", getattr(config, "use_cache", True)))


def _empty_cache(adapter: DecoderAdapter, call: Call) -> DynamicCache | None:
    """The call's cache, or a new one; None if it is of a kind of its own."""
    held = call.get("past_key_values")
    if held is None:
        return DynamicCache(config=adapter.model.config)
    # A cache that an earlier session filled, and that was reset since, has empty layers of that session's kind.
    held.layers = [DynamicLayer() if isinstance(layer, GrowingLayer) else layer for layer in held.layers]
    plain = type(held) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in held.layers
    )
    return held if plain else None


# ---- rows: prompts rearranged ---------------------------------------------------------------------------------------


def _pack(adapter: DecoderAdapter, method: Any, session: Session, call: Call, real: Tensor, plain: Forward) -> Any:
    ids: Tensor = call["input_ids"]
    batch, width = ids.shape
    keep, held = call.get("logits_to_keep", 0), _empty_cache(adapter, call)
    odd = [k for k, v in call.items() if k not in PLAIN and v is not False]
    tokens = int(real.sum())
    if tokens == batch * width or odd or not isinstance(keep, int) or held is None or call.get("return_dict") is False:
        return plain(**call)
    start = perf_counter()
    logits, keys, values = prefill_rows(
        adapter, plain, ids, real, positions=call.get("position_ids"), keep=keep, row=method.row
    )
    wanted = _wants_cache(adapter, call)
    if wanted:
        fill(held, keys, values, width)
    costs, shown = adapter.costs, logits.shape[1]
    session.flops += sum(costs.flops(n, n, min(n, shown)) for n in real.sum(1).tolist())
    session.flops -= batch * costs.flops(width, width, shown)  # what the counter takes it for
    session.record("prefill", before=batch * width, after=tokens, seconds=perf_counter() - start)
    session.start_maps("prefill")
    session.add_map("prefill", method.reduce(View(mask=real)))
    return CausalLMOutputWithPast(logits=logits, past_key_values=held if wanted else None)  # type: ignore[arg-type]


# ---- heads: tokens left out of attention ----------------------------------------------------------------------------


def _check_plain_attention(adapter: DecoderAdapter, name: str) -> None:
    """Raise ThriftError where attention is more than a softmax of scaled products."""
    for module in adapter.attentions:
        if getattr(module, "attn_logit_softcapping", None) is not None or hasattr(module, "sinks"):
            raise ThriftError(
                f"layer {module.layer_idx} ({type(module).__name__}) caps its scores or has sinks of its own, which "
                f"prefill={name} does not know: use prefill=gemfilter"
            )


def _full_layers(adapter: DecoderAdapter) -> list[int]:
    """The layers whose attention has no window."""
    windows = adapter.costs.windows or (None,) * len(adapter.attentions)
    return [i for i, window in enumerate(windows) if window is None]


def _thin_out(adapter: DecoderAdapter, method: Any, session: Session, call: Call, real: Tensor, plain: Forward) -> Any:
    full = _full_layers(adapter)
    layers = [i for i in method.sparse_layers(len(adapter.attentions)) if i in full]
    session.start_maps("prefill")

    def make(module: Any) -> Attend:
        return partial(_attend_thinned, adapter, method, session, real, int(module.layer_idx))

    with ExitStack() as undo:
        replace_attention([adapter.attentions[i] for i in layers], make, undo)
        return plain(**call)


def _attend_thinned(
    adapter: DecoderAdapter,
    method: Any,
    session: Session,
    real: Tensor,
    layer: int,
    run: Run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """One layer's attention, ``(batch, heads, tokens, dim)``."""
    start = perf_counter()
    heads, n = query.shape[1:3]
    view = View(queries=query, keys=key, scaling=scaling, mask=real, layer=layer, layers=len(adapter.attentions))
    view.offer("attention", lambda rows: attention_rows(query[:, :, -rows:], key, scaling, real))
    map: TokenMap = method.reduce(view.require(method.info.needs))
    seconds = perf_counter() - start
    kept = int(real.sum()) * heads if map.is_identity else int(map.mask.sum())
    session.record("prefill", before=int(real.sum()) * heads, after=kept, seconds=seconds)
    session.add_map("prefill", map, layer)
    if map.is_identity:
        return run(query, key, value, mask)
    full, small = (attention_flops(m, m, heads, query.shape[-1]) for m in (n, map.n_out))
    session.flops -= len(query) * (full - small)
    return attend_selected(query, key, value, map, scaling)


# ---- blocks: keys that blocks of queries read ------------------------------------------------------------------------


def _read_sparsely(
    adapter: DecoderAdapter, method: Any, session: Session, call: Call, real: Tensor, plain: Forward
) -> Any:
    lengths = real.sum(1).tolist()

    def make(module: Any) -> Attend:
        return partial(_attend_blocks, adapter, method, session, lengths, int(module.layer_idx))

    with ExitStack() as undo:
        replace_attention([adapter.attentions[i] for i in _full_layers(adapter)], make, undo)
        return plain(**call)


def _attend_blocks(
    adapter: DecoderAdapter,
    method: Any,
    session: Session,
    lengths: list[int],
    layer: int,
    run: Run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """One layer's attention, ``(batch, heads, tokens, dim)``; each row without its padding, on the left."""
    start = perf_counter()
    heads, width = query.shape[1:3]
    rows, chosen = [], []
    for row, n in enumerate(lengths):
        rows.append(tuple(t[row, :, width - n :] for t in (query, key, value)))
        view = View(queries=rows[-1][0][None], keys=rows[-1][1][None], layer=layer, layers=len(adapter.attentions))
        chosen.append(method.select(view.require(method.info.needs)))
    seconds = perf_counter() - start
    before, after, out = sum(lengths) * heads, 0.0, query
    if all(reads is None for reads in chosen):
        after, out = before, run(query, key, value, mask)
    else:
        out = query.new_zeros(*query.shape[:3], value.shape[-1])
        for row, n, (q, k, v), reads in zip(range(len(rows)), lengths, rows, chosen, strict=True):
            out[row, :, width - n :], share = attend_reads(q, k, v, reads, scaling)
            after += n * heads * share
            session.flops -= (1 - share) * attention_flops(n, n, heads, query.shape[-1])
    session.record("prefill", before=before, after=round(after), seconds=seconds)
    return out


# ---- layers: tokens left behind -------------------------------------------------------------------------------------


def _go_lazily(
    adapter: DecoderAdapter,
    session: Session,
    start: Callable[[DynamicCache, Tensor], None],
    call: Call,
    real: Tensor,
    plain: Forward,
) -> Any:
    held = _empty_cache(adapter, call)
    if held is None:
        raise ThriftError(
            f"tokens cannot wait beside a {type(call['past_key_values']).__name__}; use the default cache "
            "(no cache_implementation, no quantized or offloaded cache)"
        )
    session.start_maps("prefill")
    start(held, real)
    out = plain(**{**call, "past_key_values": held})
    if not _wants_cache(adapter, call) and hasattr(out, "past_key_values"):
        out.past_key_values = None
    return out


# ---- cascade: tokens and heads dropped ------------------------------------------------------------------------------


def _go_down(
    adapter: DecoderAdapter,
    session: Session,
    run: Callable[[Callable[[], Any], DynamicCache | None, Tensor], Any],
    call: Call,
    real: Tensor,
    plain: Forward,
) -> Any:
    session.start_maps("prefill")
    if not _wants_cache(adapter, call):
        return run(lambda: plain(**call), None, real)
    held = _empty_cache(adapter, call)
    if held is None:
        raise ThriftError(
            f"tokens cannot be dropped from a {type(call['past_key_values']).__name__}; use the default cache "
            "(no cache_implementation, no quantized or offloaded cache)"
        )
    return run(lambda: plain(**{**call, "past_key_values": held}), held, real)


# ---- prompt: a shorter one ------------------------------------------------------------------------------------------


def _shorten(adapter: DecoderAdapter, method: Any, session: Session, call: Call, real: Tensor, plain: Forward) -> Any:
    start = perf_counter()
    batch, width = real.shape
    layer = _scoring_layer(adapter, method)
    looked = cache(lambda: _queries_and_keys(adapter, layer, call, plain))
    view = View(queries=Lazy(lambda: looked()[0]), keys=Lazy(lambda: looked()[1]), mask=real)
    if "draft" in method.info.needs:
        draft = draft_for(method.model, adapter.model, method.info.name, session.processor)
        view.offer("draft", partial(draft_attention, draft, call["input_ids"], real))
    map: TokenMap = method.reduce(view.require(method.info.needs))
    seconds = perf_counter() - start
    session.start_maps("prefill")
    session.add_map("prefill", map)
    session.record("prefill", before=int(real.sum()), after=int((map.kept & real).sum()), seconds=seconds)
    costs = adapter.costs
    if view.computed() & {"queries", "keys"}:  # the last of these layers does not run whole
        session.flops += batch * costs.flops(width, width, 0) * (layer + 1) / len(adapter.attentions)
    if map.is_identity:
        return plain(**call)
    held = _empty_cache(adapter, call)
    if held is None:
        raise ThriftError(
            f"prefill={method.info.name} cannot shorten a {type(call['past_key_values']).__name__}; use the default "
            "cache (no cache_implementation, no quantized or offloaded cache)"
        )
    # The kept tokens of each row, aligned to the right.
    kept = map.kept & real
    columns = int(kept.sum(1).max())
    order = kept.to(torch.uint8).argsort(dim=1, stable=True)[:, width - columns :]
    short = kept.gather(1, order)
    positions, counts = call.get("position_ids"), short.sum(1)
    shift = (real.sum(1) if positions is None else positions[:, -1] + 1) - counts
    wanted = _wants_cache(adapter, call)
    given = {k: v for k, v in call.items() if k != "past_key_values"}
    out = plain(
        **{
            **given,
            "input_ids": call["input_ids"].gather(1, order),
            "attention_mask": None if bool(short.all()) else short.long(),
            "position_ids": (short.long().cumsum(1) - 1).clamp(min=0),
        },
        **({"past_key_values": held} if wanted else {}),
    )
    logits = out.logits if hasattr(out, "logits") else out[0]
    session.flops += batch * (
        costs.flops(columns, columns, logits.shape[1]) - costs.flops(width, width, logits.shape[1])
    )
    if wanted:
        shorten(held, short, width - columns, shift.expand(batch))
    return out


def _go_on(adapter: DecoderAdapter, session: Session, cache: ShortenedCache, call: Call, plain: Forward) -> Any:
    """A forward of later tokens."""
    tokens = call["input_ids"] if "input_ids" in call else call["inputs_embeds"]
    batch, new = tokens.shape[:2]
    seen = int(cache.get_seq_length())
    with cache.inside():
        out = plain(**cache.translate(call, new, tokens.device))
    costs = adapter.costs
    session.flops_dense += batch * (costs.flops(new, seen + new) - costs.flops(new, seen - cache.dropped + new))
    return out


def _scoring_layer(adapter: DecoderAdapter, method: Any) -> int:
    """The layer whose queries and keys the method looks at, if it looks at any."""
    return int(method.scoring_layer(len(adapter.attentions))) if hasattr(method, "scoring_layer") else 0


class _Enough(Exception):
    """Ends a forward of which no more is needed."""


class _Catch(Watcher):
    """Takes the queries and keys of a layer's attention call, and ends the forward there."""

    def __init__(self) -> None:
        self.found: tuple[Tensor, Tensor] | None = None

    def before(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
        self.found = (query, key)
        raise _Enough

    def after(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> None:
        raise AssertionError("the forward ended before")


def _queries_and_keys(adapter: DecoderAdapter, layer: int, call: Call, plain: Forward) -> tuple[Tensor, Tensor]:
    """Of one layer, ``(batch, heads, tokens, dim)`` and ``(batch, kv_heads, tokens, dim)`` after RoPE; the layers after
    it do not run."""
    catch = _Catch()

    def make(module: nn.Module) -> _Catch:
        return catch

    given = {k: v for k, v in call.items() if k in ("input_ids", "attention_mask", "position_ids")}
    with watching_instead([adapter.attentions[layer]], make), torch.no_grad(), suppress(_Enough):
        plain(**given, use_cache=False)
    assert catch.found is not None
    return catch.found
