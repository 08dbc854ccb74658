"""Layers that compute ever fewer tokens and heads of a prompt (SpAtten, arXiv 2012.09852; FastV, arXiv 2403.06764).

After some layers tokens are dropped, any of them or only visual ones: the layers above neither compute nor store them.
What a cache layer then holds is a :class:`~tokenthrift.models.kv.ReducedLayer`, so later tokens find masks and
positions right. Heads that are dropped give zeros, and their attention is not computed, in the prompt and for all that
follows. Of the attention that tokens are ranked by, only what a method asks for is computed: sums over all queries and
layers so far, or the last rows of one layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from ..core.costs import attention_flops
from ..core.errors import ThriftError
from ..core.session import Session
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.attention import attention_received, attention_rows
from ..ops.pruned_attention import attend_all, attend_top_values, of_heads
from .attention import Run, replace_attention, watch_attention
from .cache_stage import CacheWatcher
from .depth import Depth
from .kv import ReducedLayer
from .layer_kinds import check_windows
from .replacing import note_calls, replace_method

if TYPE_CHECKING:
    from .decoder import DecoderAdapter


class CascadeLayer(ReducedLayer):
    """The keys and values of the tokens that a layer computed.

    Attributes:
        heads: ``(batch, some)`` int64, the query heads that the layer computes; None for all.

    Args:
        keys, values: ``(batch, kv_heads, columns, head_dim)``.
        columns: ``(batch, columns)`` int64, where these stand in the prompt, ascending, after -1 where a row has fewer.
        real: ``(batch, columns)`` bool, false where there is no token.
        n: columns of the prompt.
        heads: as above.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, columns: Tensor, real: Tensor, n: int, heads: Tensor | None
    ) -> None:
        lead = keys.shape[:2]
        super().__init__(keys, values, TokenMap.identity(keys.shape[-2], lead, keys.device), real)
        if columns.shape[1] < n or bool((columns < 0).any()):  # the fullest row may have lost nothing
            self.map = TokenMap.select(columns[:, None].expand(-1, lead[1], -1), n)
            self.seen, self.whole = n, False
        self.heads = heads

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._rows(change)
        self.heads = None if self.heads is None else change(self.heads)


def install_cascade(
    adapter: DecoderAdapter, method: Any, session: Session, undo: ExitStack
) -> Callable[[Callable[[], Any], Cache | None, Tensor], Any]:
    """Let layers drop what ``method`` does not keep until ``undo`` closes.

    Returns:
        What runs the forward of a prompt, given that, the cache that it fills, if any, and which tokens are real.

    Raises:
        ThriftError: layers that cannot be found, have a sliding window, or are not there; a model without visual tokens
            for a method that drops these.
    """
    name = method.info.name
    if "visual" in method.info.needs and not hasattr(adapter, "visual"):
        raise ThriftError(
            f"prefill={name} drops visual tokens, and {type(adapter.model).__name__} reads text only: "
            "use prefill=gemfilter or prefill=spatten_cascade"
        )
    layers = Depth(adapter.model).layers
    check_windows(adapter, f"prefill={name}", "connector=..." if hasattr(adapter, "visual") else "prefill=gemfilter")
    run = Cascade(adapter, method, session)
    for i, layer in enumerate(layers):
        replace_method(layer, "forward", partial(_layer_forward, run, i), undo)

    def make(module: nn.Module) -> CascadeWatcher:
        watcher = CascadeWatcher(module, len(layers), method, session, run)
        note_calls(module, watcher.note_call, undo)
        run.watchers.append(watcher)
        return watcher

    watch_attention(adapter.attentions, make, undo)
    if getattr(method, "own_attention", False):
        replace_attention(adapter.attentions, lambda module: partial(run.attend, int(module.layer_idx)), undo)  # type: ignore[arg-type]
    return run.prompt


def _layer_forward(
    run: Cascade, index: int, plain: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Any:
    if run.real is None:
        return plain(hidden_states, *args, **kwargs)
    return run.layer(index, plain, hidden_states, args, kwargs)


class Cascade:
    """Runs a prompt through the layers, each on what is left.

    Attributes:
        real: ``(batch, n)`` bool, false for padding; None while no prompt runs.
        columns: ``(batch, columns)`` int64, where the tokens that are left stand in the prompt, aligned to the right,
            -1 where a row has fewer; None while all are there.
        importance: ``(batch, n)``, attention received so far.
        magnitude: ``(batch, heads)``, absolute outputs so far.
        kept_heads: ``(batch, some)`` int64; None while all are there.
        visual: ``(batch, n)`` bool, the visual tokens of the prompt; None where no method asks for them.
        asked: queries, keys and scaling of a layer after which tokens go, for a method that looks at its attention.
    """

    def __init__(self, adapter: DecoderAdapter, method: Any, session: Session) -> None:
        self.adapter, self.method, self.session = adapter, method, session
        self.depth = len(adapter.attentions)
        self.token_ends = method.token_shares(self.depth)
        self.head_ends = method.head_shares(self.depth) if hasattr(method, "head_shares") else {}
        self.needs = set(method.info.needs)
        self.watchers: list[CascadeWatcher] = []
        self._forget()

    def _forget(self) -> None:
        self.cache: Cache | None = None
        self.real: Tensor | None = None
        self.columns: Tensor | None = None
        self.importance: Tensor | None = None
        self.magnitude: Tensor | None = None
        self.kept_heads: Tensor | None = None
        self.visual: Tensor | None = None
        self.asked: tuple[Tensor, Tensor, float] | None = None
        self.given: dict[str, Any] = {}

    def prompt(self, forward: Callable[[], Any], cache: Cache | None, real: Tensor) -> Any:
        """The forward of a prompt."""
        if "visual" in self.needs:
            self.visual = self.adapter.visual()  # type: ignore[attr-defined]
            if self.visual is None or not bool(self.visual.any()):
                return forward()
        self.cache, self.real = cache, real
        try:
            return forward()
        finally:
            self._forget()

    @property
    def there(self) -> Tensor:
        """``(batch, columns)`` bool: which columns of what is left hold real tokens."""
        assert self.real is not None
        return self.real if self.columns is None else self.columns >= 0

    def layer(self, index: int, plain: Callable[..., Any], whole: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Run a layer on what is left of the ``whole`` prompt. What was dropped stays what it was: models may add
        something to all tokens between two layers, and logits of all positions may be asked for."""
        assert self.real is not None
        columns = self.columns
        if columns is None:
            hidden = whole = plain(whole, *args, **kwargs)
        else:
            kwargs = {**kwargs, **self.given}
            hidden = plain(_columns_of(whole, columns.clamp(min=0)), *args, **kwargs)
            whole = _put(whole, columns, hidden)
        self._count(hidden.shape[1], self._store(index))
        if index in self.head_ends:
            self._drop_heads(index)
        if index in self.token_ends:
            self._drop_tokens(index, hidden, kwargs)
        return whole

    def _store(self, index: int) -> int:
        """Let the cache know what the layer's entries are; returns their bytes."""
        held = None if self.cache is None else self.cache.layers[index]
        if not isinstance(held, DynamicLayer):
            return 0
        assert self.cache is not None and self.real is not None and held.keys is not None and held.values is not None
        size, n = held.keys.nbytes + held.values.nbytes, self.real.shape[1]
        if self.columns is None and self.kept_heads is None:
            return size
        columns = torch.arange(n, device=held.keys.device).expand(self.real.shape)
        columns = columns if self.columns is None else self.columns
        self.cache.layers[index] = CascadeLayer(held.keys, held.values, columns, self.there, n, self.kept_heads)
        return size

    def _count(self, computed: int, size: int) -> None:
        assert self.real is not None
        costs, (batch, n) = self.adapter.costs, self.real.shape
        heads = costs.heads if self.kept_heads is None else self.kept_heads.shape[1]
        saved = (n - computed) * costs.per_token / costs.layers + attention_flops(n, n, costs.heads, costs.head_dim)
        self.session.flops -= batch * (saved - attention_flops(computed, computed, heads, costs.head_dim))
        self.session.record(
            "prefill",
            before=int(self.real.sum()),
            after=int(self.there.sum()),
            bytes_before=size // computed * n,
            bytes_after=size,
        )

    def _drop_tokens(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        start, real = perf_counter(), self.real
        assert real is not None
        there, n = self.there, real.shape[1]
        columns = torch.arange(n, device=hidden.device).expand(real.shape) if self.columns is None else self.columns
        view = self._view(index, columns)
        map: TokenMap = self.method.reduce(view.require(self.method.info.needs))
        view.forget()
        self.asked = None
        if not map.is_identity:
            kept = map.kept & there
            width = int(kept.sum(1).max())
            order = kept.to(torch.uint8).argsort(dim=1, stable=True)[:, there.shape[1] - width :]
            there = kept.gather(1, order)
            map = TokenMap.select(torch.where(there, order, -1), map.n_in)
            self.columns = torch.where(there, columns.gather(1, order), -1)
            self._give(order, kwargs, hidden)
        self.session.add_map("prefill", map)
        self.session.records["prefill"].seconds += perf_counter() - start

    def _view(self, index: int, columns: Tensor) -> View:
        """What the method may look at after a layer, of the tokens that are left."""
        assert self.real is not None
        there = self.there
        protected = torch.zeros_like(there)
        protected[:, -1] = True
        view = View(lengths=self.real.sum(1), mask=there, protected=protected, layer=index, layers=self.depth)
        if self.importance is not None:
            view.offer("importance", self.importance.gather(1, columns.clamp(min=0)))
        if self.asked is not None:
            query, key, scaling = self.asked
            view.offer("attention", lambda rows: attention_rows(query[:, :, -rows:], key, scaling, there))
        if self.visual is not None:
            view.offer("visual", self.visual.gather(1, columns.clamp(min=0)) & there)
            view.offer("visual_lengths", (self.visual & self.real).sum(1))
        return view

    def _give(self, order: Tensor, kwargs: dict[str, Any], hidden: Tensor) -> None:
        """The positions and the mask of what is left: a token sees what is left before it."""
        turns = kwargs.get("position_embeddings")
        if turns is None:
            raise ThriftError(f"the layers of {type(self.adapter.model).__name__} are given no rotations")
        given: dict[str, Any] = {"position_ids": None}
        given["position_embeddings"] = tuple(
            _columns_of(t.expand(*t.shape[:-3], len(order), -1, -1), order) for t in turns
        )
        if kwargs.get("attention_mask") is not None or not bool(self.there.all()):
            m = order.shape[1]
            hide = torch.ones(m, m, dtype=torch.bool, device=hidden.device).triu(1) | ~self.there[:, None, None]
            mask = torch.zeros(hide.shape, dtype=hidden.dtype, device=hidden.device)
            given["attention_mask"] = mask.masked_fill_(hide, torch.finfo(hidden.dtype).min)
        self.given = given

    def _drop_heads(self, index: int) -> None:
        assert self.magnitude is not None
        # Those that are gone were below the others when they went, and have not grown since.
        self.kept_heads = self.method.choose_heads(self.magnitude, index, self.depth)
        extra = self.session.records["prefill"].extra
        extra["heads_left"] = self.kept_heads.shape[1]

    def listen(self, index: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """Note of the attention of a layer what the method will look at."""
        if self.real is None or not self.token_ends or index > max(self.token_ends):
            return
        if index in self.token_ends and "attention" in self.needs:
            self.asked = (query, key, scaling)
        if "importance" not in self.needs:
            return
        there = self.there
        if self.kept_heads is not None:
            query, key, _, _ = of_heads(query, key, key, self.kept_heads)
        received = attention_received(query, key, scaling, there).sum(1)
        if self.importance is None:
            self.importance = received.new_zeros(self.real.shape)
        if self.columns is None:
            self.importance += received
        else:
            self.importance.scatter_add_(1, self.columns.clamp(min=0), received * there)

    def attend(
        self, index: int, run: Run, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """One layer's attention: ``(batch, heads, q, dim)``."""
        prompt, held, method = self.real is not None, self.watchers[index].stored, self.method
        heads = self.kept_heads if prompt else held.heads if isinstance(held, CascadeLayer) else None
        step = not prompt and query.shape[2] == 1 and (method.values < 1 or method.threshold is not None)
        if heads is None and not step:
            out = run(query, key, value, mask)
        else:
            shape = (*query.shape[:3], value.shape[-1])
            if heads is not None:
                query, key, value, mask = of_heads(query, key, value, heads, mask)
            if step:
                out, unsure = attend_top_values(query, key, value, scaling, mask, method.values, method.threshold)
                self._count_reads(unsure)
            else:
                out = attend_all(query, key, value, scaling, mask)
            if not prompt:
                self._count_step(shape, query.shape[1], key.shape[2], method.values if step else 1)
            if heads is not None:
                index_of = heads[..., None, None].expand_as(out)
                out = out.new_zeros(shape).scatter_(1, index_of, out)
        if prompt and self.head_ends and index <= max(self.head_ends):
            sizes = (out.abs().sum(-1, dtype=torch.float32) * self.there[:, None]).sum(-1)
            self.magnitude = sizes if self.magnitude is None else self.magnitude + sizes
        return out

    def _count_step(self, shape: tuple[int, ...], heads: int, entries: int, values: float) -> None:
        batch, all_heads, queries, dim = shape
        saved = attention_flops(queries, entries, all_heads, dim) - attention_flops(queries, entries, heads, dim)
        self.session.flops -= batch * (saved + (1 - values) * attention_flops(queries, entries, heads, dim) / 2)

    def _count_reads(self, unsure: Tensor) -> None:
        """How often the higher bits of the keys were not enough."""
        if self.method.threshold is None:
            return
        extra = self.session.record("prefill", before=0, after=0).extra
        for name, value in (("key_reads", unsure.numel()), ("key_reads_of_all_bits", int(unsure.sum()))):
            extra[name] = extra.get(name, 0) + value


class CascadeWatcher(CacheWatcher):
    """One attention layer: hands on the attention of prompts, and supplies later tokens with masks that fit."""

    def __init__(self, module: nn.Module, layers: int, method: Any, session: Session, run: Cascade) -> None:
        super().__init__(module, layers, method, session)
        self.run = run

    @property
    def stored(self) -> Any:
        """The cache layer of the forward that runs."""
        return self._stored()

    def after(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> None:
        self.cache = self.rotary = None
        self.run.listen(self.layer, query, key, scaling)


def _put(x: Tensor, columns: Tensor, new: Tensor) -> Tensor:
    """A copy of ``(batch, n, dim)`` with the ``(batch, columns, dim)`` of some of its tokens."""
    row, slot = (columns >= 0).nonzero(as_tuple=True)
    return x.index_put((row, columns[row, slot]), new[row, slot])


def _columns_of(x: Tensor, order: Tensor) -> Tensor:
    """The tokens at ``order`` ``(batch, columns)`` of ``(..., batch, n, dim)``: rotations may be several a token."""
    index = order.unsqueeze(-1).expand(*x.shape[:-3], *order.shape, x.shape[-1])
    return x.gather(-2, index)
