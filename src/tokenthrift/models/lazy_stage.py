"""Layers that compute only a part of a prompt, and more of it when a later token asks (LazyLLM, arXiv 2407.14057).

After some layers, tokens are left behind: the layers above neither compute nor attend to them. Their hidden states wait
in an auxiliary cache, so a later forward that wants one of them goes on from there: no layer computes a token twice.
Layers between two such points form a *floor*; all its layers know the same tokens. Positions are those of the text.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer

from ..core.costs import attention_flops
from ..core.errors import ThriftError
from ..core.session import Session
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.attention import attention_rows
from .attention import Watcher, cache_among, watch_attention
from .depth import Depth
from .layer_kinds import check_windows
from .replacing import replace_method

if TYPE_CHECKING:
    from .decoder import DecoderAdapter


class Lazy:
    """What is known of a prompt, for all layers of a cache; ``n`` is its number of columns.

    Attributes:
        real: ``(batch, n)`` bool, false for padding.
        known: of each floor, ``(batch, n)`` bool: the tokens whose keys and values its layers have.
        waiting: of each floor, ``(batch, n, dim)``: what its last layer gave for these; for others, what came before.
        turns: cos and sin of the prompt's positions.
        seen: ``(batch, columns)`` int64, the tokens of the floor that runs, aligned to the right, -1 where a row has
            fewer; ``fresh`` those of them that it computes. Both empty on the ground floor, which has all.
    """

    def __init__(self, real: Tensor, floors: int) -> None:
        self.real = real
        self.known = [real, *(torch.zeros_like(real) for _ in range(floors - 1))]
        self.waiting: list[Tensor] = []
        self.turns: tuple[Tensor, ...] = ()
        self.scores: Tensor | None = None
        self.enter()

    def enter(self) -> None:
        """A forward begins, on the ground floor."""
        self.seen = self.fresh = torch.empty(0, dtype=torch.long)

    @property
    def there(self) -> Tensor:
        """``(batch, columns)`` bool: of the floor's tokens, those that are some."""
        if not self.seen.numel():
            return self.real
        return (self.seen >= 0) & self.real.gather(1, self.seen.clamp(min=0))

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Rearrange the rows of the batch."""
        self.real, self.known = change(self.real), [change(t) for t in self.known]
        self.waiting = [change(t) for t in self.waiting]
        self.turns = tuple(t if len(t) == 1 else change(t) for t in self.turns)


class LazyLayer(DynamicLayer):
    """Keys and values of a prompt, some of them still missing, and of all later tokens."""

    is_croppable = False

    def __init__(self, lazy: Lazy, floor: int, first: bool) -> None:
        super().__init__()
        self.lazy, self.floor, self.first = lazy, floor, first
        self.prompt: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        lazy, n = self.lazy, self.lazy.real.shape[1]
        prefill = self.prompt is None
        if self.prompt is None:
            self.lazy_initialization(key_states, value_states)
            batch, heads, _, dim = key_states.shape
            self.keys = key_states.new_zeros(batch, heads, 0, dim)
            self.values = value_states.new_zeros(batch, heads, 0, value_states.shape[-1])
            if not self.floor:
                self.prompt = (key_states, value_states)
                return self.prompt
            self.prompt = tuple(t.new_zeros(*t.shape[:2], n, t.shape[-1]) for t in (key_states, value_states))  # type: ignore[assignment]
        assert self.prompt is not None and self.keys is not None and self.values is not None
        late = 0 if prefill else key_states.shape[2] - (lazy.fresh.shape[1] if self.floor else 0)
        out = []
        for name, held, new in zip(("keys", "values"), self.prompt, (key_states, value_states), strict=True):
            early = new[:, :, : new.shape[2] - late]
            later = torch.cat([getattr(self, name), new[:, :, new.shape[2] - late :]], dim=2)
            setattr(self, name, later)
            if self.floor:
                _put(held, lazy.fresh, early)
                held = _take(held, lazy.seen)
            out.append(torch.cat([held, later], dim=2))
        return out[0], out[1]

    def get_seq_length(self) -> int:
        return 0 if self.prompt is None else self.lazy.real.shape[1] + int(self.keys.shape[2])  # type: ignore[union-attr]

    @property
    def nbytes(self) -> int:
        """Of the keys, the values and, once a cache, the hidden states that wait."""
        held = [t for t in (self.keys, self.values, *(self.prompt or ())) if t is not None]
        return sum(t.nbytes for t in held + (self.lazy.waiting if self.first else []))

    def reset(self) -> None:
        raise ThriftError(
            "a cache in which tokens of a prompt wait cannot be reset: begin the next prompt with a new one"
        )

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.keys, self.values = change(self.keys), change(self.values)  # type: ignore[arg-type]
        if self.prompt is not None:
            self.prompt = (change(self.prompt[0]), change(self.prompt[1]))
        if self.first:
            self.lazy.rows(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda t: t[indices, ...])


def install_lazy(adapter: DecoderAdapter, method: Any, session: Session, undo: ExitStack) -> Callable[..., Any]:
    """Let the layers compute what ``method`` keeps until ``undo`` closes; returns what starts a prompt in a cache.

    Raises:
        ThriftError: layers that cannot be found, have a sliding window, or are not there.
    """
    layers, name = Depth(adapter.model).layers, method.info.name
    check_windows(adapter, f"prefill={name}", "prefill=gemfilter")
    ends: list[int] = method.ends(len(layers))
    floors = [sum(end < i for end in ends) for i in range(len(layers))]
    run = Floors(adapter, method, session, ends)
    for i, layer in enumerate(layers):
        replace_method(layer, "forward", partial(_layer_forward, run, i), undo)
    watch_attention([adapter.attentions[i] for i in ends], lambda module: _Scores(run), undo)

    def start(cache: Cache, real: Tensor) -> None:
        lazy = Lazy(real, len(ends) + 1)
        cache.layers = [LazyLayer(lazy, floor, i == 0) for i, floor in enumerate(floors)]

    return start


def _layer_forward(
    run: Floors, index: int, plain: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Any:
    cache = cache_among(args, kwargs)
    if cache is None or not cache.layers or not isinstance(cache.layers[0], LazyLayer):
        return plain(hidden_states, *args, **kwargs)
    return run.layer(index, cache.layers[index], plain, hidden_states, kwargs)  # type: ignore[arg-type]


class Floors:
    """Runs layers on the tokens of their floor; after a floor's last layer, chooses those of the next."""

    def __init__(self, adapter: DecoderAdapter, method: Any, session: Session, ends: list[int]) -> None:
        self.adapter, self.method, self.session, self.ends = adapter, method, session, ends
        self.lazy: Lazy | None = None
        self.stock: dict[str, Any] = {}
        self.given: dict[str, Any] = {}
        self.new = 0
        self.prefill = False

    def layer(self, index: int, held: LazyLayer, plain: Callable[..., Any], hidden: Tensor, kwargs: Any) -> Tensor:
        lazy = held.lazy
        if index == 0:
            self.lazy, self.stock, self.given, self.new = lazy, kwargs, {}, hidden.shape[1]
            self.prefill = held.prompt is None
            lazy.enter()
            if self.prefill:
                if "position_embeddings" not in kwargs:
                    raise ThriftError(f"the layers of {type(self.adapter.model).__name__} are given no rotations")
                lazy.turns, lazy.waiting = tuple(kwargs["position_embeddings"]), []
        computed = hidden.shape[1]
        hidden = plain(hidden, **{**kwargs, **self.given})
        self._count(computed, held)
        if index in self.ends:
            hidden = self._next_floor(self.ends.index(index), hidden, int(held.keys.shape[2]))  # type: ignore[union-attr]
        if index == len(self.adapter.attentions) - 1:
            hidden = self._whole(hidden)
            self.stock, self.given, self.lazy = {}, {}, None
        return hidden

    def _count(self, computed: int, held: LazyLayer) -> None:
        costs, batch = self.adapter.costs, len(held.lazy.real)
        seen = held.get_seq_length()
        attended = seen if not held.floor else held.lazy.seen.shape[1] + int(held.keys.shape[2])  # type: ignore[union-attr]
        saved = (self.new - computed) * costs.per_token / costs.layers
        saved += attention_flops(self.new, seen, costs.heads, costs.head_dim)
        saved -= attention_flops(computed, attended, costs.heads, costs.head_dim)
        self.session.flops -= batch * saved

    def _next_floor(self, floor: int, hidden: Tensor, stored: int) -> Tensor:
        """From a floor's output to the next floor's input; ``stored`` later tokens are in the cache by now."""
        start, lazy = perf_counter(), self.lazy
        assert lazy is not None and lazy.scores is not None
        n, late = lazy.real.shape[1], 0 if self.prefill else self.new
        # What waits now: this floor's output where it ran, else what waited before.
        early = hidden[:, : hidden.shape[1] - late]
        if self.prefill:
            waiting = hidden if not floor else lazy.waiting[floor - 1].clone()
            lazy.waiting.append(waiting)
        if floor:
            _put(lazy.waiting[floor].unsqueeze(1), lazy.fresh, early.unsqueeze(1))
        map = self._choose(floor)
        wanted = torch.zeros_like(lazy.real)
        columns = lazy.seen if floor else torch.arange(n, device=hidden.device).expand(len(hidden), n)
        kept = map.kept[:, : columns.shape[1]] & (columns >= 0)
        _mark(wanted, columns, kept)
        wanted &= lazy.real
        fresh = wanted & ~lazy.known[floor + 1]
        lazy.known[floor + 1] = lazy.known[floor + 1] | fresh
        whole = columns.shape[1] == n and map.is_identity and (self.prefill or not bool(fresh.any()))
        if whole:  # as the model would: also its padding goes on
            lazy.seen = torch.arange(n, device=hidden.device).expand(len(hidden), n)
            lazy.fresh = lazy.seen if self.prefill else lazy.seen[:, :0]
        else:
            lazy.seen, lazy.fresh = _columns(wanted), _columns(fresh)
        revived = _take(lazy.waiting[floor].unsqueeze(1), lazy.fresh).squeeze(1)
        if whole:
            self.given = {}
        else:
            self._give(late, stored, hidden)
        before = int(lazy.real.sum()) if self.prefill else 0
        record = self.session.record(
            "prefill", before=before, after=int(wanted.sum()) if self.prefill else 0, seconds=perf_counter() - start
        )
        if self.prefill:
            # The floor's tokens are aligned to the right, those of a map to the left.
            self.session.add_map("prefill", map if whole else TokenMap.select(_columns(kept), map.n_in))
        else:
            record.extra["revived"] = record.extra.get("revived", 0) + int(fresh.sum())
        return torch.cat([revived, hidden[:, hidden.shape[1] - late :]], dim=1)

    def _choose(self, floor: int) -> TokenMap:
        lazy = self.lazy
        assert lazy is not None and lazy.scores is not None
        scores = lazy.scores
        prompt = lazy.there
        mask = pad(prompt, (0, scores.shape[-1] - prompt.shape[1]), value=True)
        protected = torch.zeros_like(mask)
        protected[:, prompt.shape[1] if not self.prefill else -1 :] = True
        view = View(mask=mask, protected=protected, layer=self.ends[floor], layers=len(self.adapter.attentions))
        view.offer("attention", lambda rows: scores)
        map: TokenMap = self.method.reduce(view.require(self.method.info.needs))
        lazy.scores = None
        return map

    def _give(self, late: int, stored: int, hidden: Tensor) -> None:
        """The mask and the positions of the floor that begins: a token sees what stands before it in the text."""
        lazy = self.lazy
        assert lazy is not None
        n, device = lazy.real.shape[1], hidden.device
        batch = len(hidden)
        after = torch.arange(n, n + stored, device=device).expand(batch, stored)
        keys = torch.cat([lazy.seen, after], dim=1)
        queries = torch.cat([lazy.fresh, after[:, stored - late :]], dim=1)
        allowed = (keys[:, None, :] <= queries[:, :, None]) & (keys >= 0)[:, None, :]
        mask = torch.zeros(allowed.shape, dtype=hidden.dtype, device=device)
        mask = mask.masked_fill_(~allowed, torch.finfo(hidden.dtype).min).unsqueeze(1)
        turns = []
        for prompt, new in zip(lazy.turns, self.stock["position_embeddings"], strict=True):
            old = _take(prompt.expand(batch, -1, -1).unsqueeze(1), lazy.fresh).squeeze(1)
            turns.append(torch.cat([old, new.expand(batch, -1, -1)], dim=1) if late else old)
        self.given = {"attention_mask": mask, "position_embeddings": tuple(turns), "position_ids": None}

    def _whole(self, hidden: Tensor) -> Tensor:
        """The output with all columns: those left behind show what they were when they stopped."""
        if not self.prefill:
            return hidden[:, hidden.shape[1] - self.new :]
        lazy = self.lazy
        assert lazy is not None
        out = lazy.waiting[-1].clone()
        _put(out.unsqueeze(1), lazy.fresh, hidden.unsqueeze(1))
        return out


class _Scores(Watcher):
    """Notes the attention of the last query at the end of a floor."""

    def __init__(self, run: Floors) -> None:
        self.run = run

    def after(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> None:
        lazy = self.run.lazy
        if lazy is None:
            return
        real = pad(lazy.there, (0, key.shape[2] - lazy.there.shape[1]), value=True)
        lazy.scores = attention_rows(query[:, :, -1:], key, scaling, real)


def _columns(chosen: Tensor) -> Tensor:
    """``(batch, n)`` bool to the columns that are true, aligned to the right; -1 before them."""
    width = int(chosen.sum(1).max()) if chosen.numel() else 0
    order = chosen.to(torch.uint8).argsort(dim=1, stable=True)[:, chosen.shape[1] - width :]
    return torch.where(chosen.gather(1, order), order, -1)


def _take(x: Tensor, columns: Tensor) -> Tensor:
    """``(batch, heads, n, dim)`` at ``(batch, columns)``; something where there is none."""
    index = columns.clamp(min=0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])
    return x.gather(2, index)


def _put(x: Tensor, columns: Tensor, new: Tensor) -> None:
    """Write ``(batch, heads, columns, dim)`` where they belong, in place."""
    row, slot = (columns >= 0).nonzero(as_tuple=True)
    x[row, :, columns[row, slot]] = new[row, :, slot]


def _mark(chosen: Tensor, columns: Tensor, kept: Tensor) -> None:
    """Set the columns of what is kept, in place."""
    row, slot = kept.nonzero(as_tuple=True)
    chosen[row, columns[row, slot]] = True
