"""What is known during one forward of an encoder, and what of it a method is shown.

Methods never see padding. Where rows of a batch have different numbers of tokens (texts of different lengths, or images
of which a method kept more or fewer), rows of equal length are shown together, without their padding, and the maps that
come back are put together again: every row is reduced as if it were alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial, reduce
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..core.tokenmap import TokenMap
from ..core.view import Lazy, View
from ..ops.matching import leading
from .encoder import Family, part


class Parts:
    """The modules of an encoder that take part, found once."""

    def __init__(self, encoder: nn.Module, family: Family, layers: list[nn.Module]) -> None:
        self.encoder, self.family, self.layers = encoder, family, layers
        self.patches: Any = part(encoder, family.patches) if family.patches else None
        self.attentions = [part(layer, family.attention) for layer in layers]

    @cached_property
    def head_dim(self) -> int:
        """Channels of a head."""
        attention = self.attentions[0]
        return int(getattr(attention, "head_dim", None) or attention.attention_head_size)

    @cached_property
    def heads(self) -> int:
        """Number of heads."""
        fused = 3 if self.family.query == self.family.key else 1
        return int(part(self.layers[0], self.family.query).out_features // fused // self.head_dim)

    def project(self, i: int, h: Tensor) -> dict[str, Tensor]:
        """What the query and key projections of layer ``i`` will make of its input ``h``."""
        family, layer = self.family, self.layers[i]
        x = part(layer, family.first_norm)(h) if family.first_norm else h
        return {path: part(layer, path)(x) for path in {family.query, family.key}}

    def split(self, i: int, path: str, seen: Tensor, third: int) -> Tensor:
        """Output of a projection as ``(batch, heads, tokens, head_dim)``; ``third`` of a fused one."""
        if self.family.query == self.family.key:
            seen = seen.chunk(3, dim=-1)[third]
        out = seen.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        norm = getattr(self.attentions[i], ("q_norm", "k_norm")[third], None)  # timm's
        return out if norm is None else norm(out)


@dataclass
class Forward:
    """A new one for each forward, so that no forward affects the next."""

    parts: Parts
    prop_attn: bool = False
    grid: tuple[int, int, int] = (0, 0, 0)
    tokens: int = 0
    """In each row at the start, padding included; ``batch`` the number of rows."""
    batch: int = 0
    layer: int = -1
    frames: int = 1
    """Rows of the original batch that have become one."""
    widths: list[tuple[int, int, int]] = field(default_factory=list)
    """Per layer: tokens that are projected, tokens that attend to each other, tokens in the MLP."""
    ahead: list[int] = field(default_factory=list)
    """Numbers of tokens whose attention was computed before their reduction, to be fused."""
    maps: list[TokenMap] = field(default_factory=list)
    around: dict[int, TokenMap] = field(default_factory=dict)
    """Reductions that were undone behind a sub-layer, by layer."""
    sizes: Tensor | None = None
    """Per token, how many it stands for: ``(batch, tokens)``; None = all one."""
    real: Tensor | None = None
    """``(batch, tokens)`` bool, false = padding; None = all real. ``given`` is that of the user's mask."""
    given: Tensor | None = None
    segments: Tensor | None = None
    """``(batch, tokens)``, groups of tokens that belong together, for texts."""
    guarded: Tensor | None = None
    """``(batch, tokens)`` bool, tokens behind the prefix that must survive; None = none."""
    last: Tensor | None = None
    """``(batch, tokens)``, of causal encoders: the latest position that a token has seen."""
    bias: Tensor | None = None
    """To be added to the attention scores; None until something is reduced."""
    seen: dict[str, Tensor] = field(default_factory=dict)
    """Outputs of this layer's query and key projections."""
    map: TokenMap | None = None
    """The reduction of the layer that is running."""
    excess: Tensor | None = None
    """``(batch, n_out, dim)``, what the method's own merging adds to the average."""
    whole: Tensor | None = None
    """The layer's full attention, if a method asked for it."""
    before: tuple[Tensor, Tensor, Tensor | None] | None = None
    """Queries, keys and bias of before the reduction, where their attention takes the place of the layer's own."""
    attended: bool = False
    """The layer's attention has asked for what takes its place."""
    partial: bool = False
    """Begun at the patch embedding: the encoder itself was not called, only a part of it."""
    replay: str = ""
    """What is computed once more for its gradients: a ``layer``, or the ``inside`` of one; or nothing."""
    seconds: float = 0.0

    @property
    def prefix(self) -> int:
        """Leading tokens that are no patches; of a text the first token."""
        if self.parts.family.text:
            return 1
        return self.tokens // self.frames - self.grid[1] * self.grid[2]

    @cached_property
    def composed(self) -> TokenMap:
        """All layers' maps so far, as one."""
        return reduce(TokenMap.then, self.maps)

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.seconds += time.perf_counter() - self._started

    def snapshot(self, replay: str) -> Forward:
        """This state, for computing a layer again."""
        return replace(
            self,
            widths=list(self.widths),
            ahead=list(self.ahead),
            maps=list(self.maps),
            seen={},
            whole=None,
            replay=replay,
        )

    # ---- its life ---------------------------------------------------------------------------------------------------

    def start(self, h: Tensor) -> None:
        """The first layer's input is known."""
        self.batch, self.tokens = h.shape[:2]
        if self.parts.family.text:
            self.grid = (1, 1, self.tokens - 1)
            real = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if self.real is None else self.real
            # The last token of a text ends it ([SEP], EOS), and CLIP reads the whole text off it.
            ends = real & (real.flip(-1).cumsum(-1).flip(-1) == 1)
            self.guarded = ends
            if self.parts.family.causal:
                self.last = torch.arange(self.tokens, device=h.device).expand(h.shape[:2])

    def join(self, h: Tensor, frames: int) -> Tensor:
        """Make rows of ``frames`` consecutive ones."""
        self.batch //= frames
        self.tokens *= frames
        self.frames *= frames
        self.grid = (frames, *self.grid[1:])
        return h.reshape(self.batch, -1, h.shape[-1])

    def commit(self, map: TokenMap) -> None:
        """From here on the tokens are those that ``map`` makes."""
        self.maps.append(map)
        self.sizes = map.sizes(self.sizes)
        self.real = map.mask if map.padded else None
        if self.guarded is not None:
            self.guarded = map.apply(self.guarded.to(torch.float32).unsqueeze(-1)).squeeze(-1) > 0
        if self.segments is not None:
            self.segments = self.segments.gather(1, map.anchors)
        if self.last is not None:
            self.last = -map.positions("first", -self.last)
        self.bias = attention_bias(self.sizes if self.prop_attn else None, self.real, self.last)
        self.__dict__.pop("composed", None)

    # ---- what methods may look at -----------------------------------------------------------------------------------

    def decide(
        self, method: Any, h: Tensor, project: Callable[[], dict[str, Tensor]]
    ) -> tuple[TokenMap, Tensor | None] | None:
        """The method's map of the tokens ``h``, and its merged features if it makes them itself."""
        if not h.shape[0]:
            return None  # a batch of no rows
        maps, features = [], []
        shown = list(self._groups())
        for rows in shown:
            view = self._view(rows, h, project).require(method.info.needs)
            map = method.reduce(view)
            maps.append(map)
            features.append(method.combine(view, map) if map is not None and hasattr(method, "combine") else None)
        if all(map is None for map in maps):
            return None
        if shown[0].all:
            return maps[0], features[0]
        return _together(shown, maps, features, h)

    def _groups(self) -> Iterator[_Rows]:
        if self.real is None:
            yield _Rows()
            return
        start = self.real if self.given is None else self.given
        lengths = torch.stack([self.real.sum(-1), start.sum(-1)], dim=-1)
        order = (~self.real).to(torch.uint8).argsort(dim=-1, stable=True)  # real tokens first
        for pair in lengths.unique(dim=0):
            rows = (lengths == pair).all(-1).nonzero().squeeze(-1)
            yield _Rows(rows, order[rows, : int(pair[0])], int(pair[1]))

    def _view(self, rows: _Rows, h: Tensor, project: Callable[[], dict[str, Tensor]]) -> View:
        parts, family = self.parts, self.parts.family
        h = rows.take(h)
        tokens = rows.start if rows.start is not None and family.text else self.tokens
        grid = (1, 1, tokens - 1) if family.text else self.grid
        segments = {} if self.segments is None else {"segments": rows.take(self.segments)}

        @cache
        def heads(which: int) -> Tensor:
            path = (family.query, family.key)[which]
            return parts.split(self.layer, path, rows.take(project()[path]), which)

        def attention(asked: Tensor | slice) -> Tensor:
            everything = asked == slice(None) if isinstance(asked, slice) else False
            if everything and rows.all and self.whole is not None:
                return self.whole
            scores = (heads(0)[:, :, asked] * self.scaling) @ heads(1).transpose(-1, -2)
            sizes = rows.take(self.sizes) if self.sizes is not None and self.prop_attn else None
            last = None if self.last is None else rows.take(self.last)
            bias = attention_bias(sizes, None, last)
            if bias is not None:
                scores += bias if bias.shape[-2] == 1 else bias[:, :, asked]
            out = torch.softmax(scores, dim=-1)
            if everything and rows.all:
                self.whole = out
            return out

        return View(
            features=h,
            keys=Lazy(partial(heads, 1)),
            attention=Lazy(lambda: attention),
            sizes=Lazy(
                lambda: torch.ones(h.shape[:2], device=h.device) if self.sizes is None else rows.take(self.sizes)
            ),
            protected=Lazy(lambda: self._protected(rows, h)),
            prefix=self.prefix,
            grid=grid,
            tokens=tokens,
            layer=self.layer,
            layers=len(parts.layers),
            **segments,
        )

    def _protected(self, rows: _Rows, h: Tensor) -> Tensor:
        if self.guarded is None and (self.frames == 1 or self.maps):
            return leading(self.prefix, h.shape[0], h.shape[1], h.device)
        slot = torch.arange(h.shape[1], device=h.device)
        if self.frames > 1 and not self.maps:  # every frame still has its own prefix
            slot = slot % (self.tokens // self.frames)
        front = (slot < self.prefix).expand(h.shape[:2])
        return front if self.guarded is None else front | rows.take(self.guarded)

    def attention_ahead(self, project: Callable[[], dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor | None]:
        """The queries, the keys and the bias of this layer as it would be without a reduction."""
        family, seen = self.parts.family, project()
        queries, keys = (self.parts.split(self.layer, p, seen[p], n) for n, p in enumerate((family.query, family.key)))
        return queries, keys, attention_bias(self.sizes if self.prop_attn else None, self.real, self.last)

    @property
    def scaling(self) -> float:
        """Factor on ``q·k`` in this layer."""
        attention = self.parts.attentions[self.layer]
        scaling = getattr(attention, "scaling", getattr(attention, "scale", None))
        return float(scaling) if isinstance(scaling, float) else self.parts.head_dim**-0.5


def attention_bias(sizes: Tensor | None, real: Tensor | None, last: Tensor | None) -> Tensor | None:
    """What to add to attention scores, ``(batch, 1, 1 or tokens, tokens)``; None = nothing.

    Args:
        sizes: ``(batch, tokens)``, for proportional attention: a token counts as often as it has sources.
        real: ``(batch, tokens)`` bool: padding is not attended to.
        last: ``(batch, tokens)``, for causal attention: a token sees those that have seen no more than it.
    """
    bias = None
    if sizes is not None:
        bias = sizes.log()[:, None, None, :]  # -inf at padding, whose size is 0
    elif real is not None:
        bias = torch.where(real, 0.0, -torch.inf)[:, None, None, :]
    if last is not None:
        hidden = last[:, None, None, :] > last[:, None, :, None]
        if real is not None:
            hidden = hidden & real[:, None, :, None]  # padding looks at something, lest its rows be NaN
        future = torch.zeros(hidden.shape, device=last.device).masked_fill_(hidden, -torch.inf)
        bias = future if bias is None else future + bias
    return bias


@dataclass
class _Rows:
    """Rows of equal length: their numbers, the places of their real tokens, how many those were at the start."""

    rows: Tensor | None = None
    index: Tensor | None = None
    start: int | None = None

    @property
    def all(self) -> bool:
        return self.rows is None

    def take(self, x: Tensor) -> Tensor:
        """Of ``(batch, tokens, ...)`` these rows' real tokens."""
        if self.rows is None or self.index is None:
            return x
        return x[self.rows.unsqueeze(-1), self.index]


def _together(
    shown: list[_Rows], maps: list[TokenMap | None], features: list[Tensor | None], h: Tensor
) -> tuple[TokenMap, Tensor | None]:
    """One map of the padded batch from those of its groups."""
    n = h.shape[1]
    whole = []
    for rows, map in zip(shown, maps, strict=True):
        assert rows.index is not None
        packed = TokenMap.select(rows.index, n)
        whole.append(packed if map is None else packed.then(map))
    stacked = TokenMap.stack(whole)
    back = torch.cat([rows.rows for rows in shown if rows.rows is not None]).argsort()
    moved: dict[str, Any] = {name: getattr(stacked, name) for name in ("source", "target", "weight", "share", "anchor")}
    changes: dict[str, Any] = {name: None if t is None else t[back] for name, t in moved.items()}
    map = replace(stacked, **changes)
    if all(f is None for f in features):
        return map, None
    combined = map.apply(h)
    for rows, made in zip(shown, features, strict=True):
        if made is not None and rows.rows is not None:
            combined[rows.rows, : made.shape[1]] = made.to(combined.dtype)
    return map, combined
