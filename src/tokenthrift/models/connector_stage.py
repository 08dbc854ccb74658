"""The connector stage: visual tokens are reduced between the vision encoder and the language model.

Nothing is changed before: the model counts its image placeholders, joins images and text, and makes positions and masks
as ever. Where it then calls its language model, the rows of ``inputs_embeds`` at the placeholders are the visual
tokens. A method sees these, image by image, and decides; the language model gets what is left, with masks, positions
and deepstack features to match, and its hidden states are put back to the columns of the prompt, each dropped column
showing what the last token before it knows. A merged token stands where its anchor stood.

A cache that was filled so (:class:`.connector_cache.ConnectorCache`) tells generation that it has seen the prompt as
the user wrote it; later forwards are translated. Rows of a batch that keep fewer tokens are padded on the left.

What a method may have besides ``reduce(view) -> TokenMap`` over ``(images,)``: ``positions`` (see
:mod:`.connector_positions`), and ``encoder_layers(count)``, the layers of the encoder that it will ask for.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor

from ..core.errors import ThriftError
from ..core.session import Session
from ..core.tokenmap import TokenMap
from ..core.view import Lazy, View
from .attention import real_tokens
from .connector_cache import ConnectorCache, check_cache, remember
from .connector_features import Features
from .connector_maps import (
    Pictures,
    Placed,
    check_map,
    columns_of,
    prompt_map,
    reduced_features,
    restored,
    runs_of,
    text_of,
)
from .connector_masks import shorten_masks
from .connector_positions import POLICIES, drop_positions
from .replacing import replace_method
from .visual_inputs import MODALITIES, check_images_given, check_placeholders

if TYPE_CHECKING:
    from .multimodal import MultimodalAdapter

_attached: WeakSet[Any] = WeakSet()
"""Models on which a session is installed."""


@dataclass
class Now:
    """The forward that runs."""

    ids: Tensor | None
    mask: Tensor | None
    pictures: dict[str, Pictures]


def install_connector(adapter: MultimodalAdapter, method: Any | None, session: Session, undo: ExitStack) -> Connector:
    """Reduce visual tokens with ``method`` until ``undo`` closes; with None, only note which columns are visual.

    Raises:
        ThriftError: a policy of positions that there is not, or layers that the encoder does not have.
    """
    made = Connector(adapter, method, session)
    made.attach(undo)
    return made


class Connector:
    """The wrappers of one session around a model's own functions.

    Attributes:
        visual: see :meth:`MultimodalAdapter.visual`.
        placed: the images of the last prompt.
    """

    def __init__(self, adapter: MultimodalAdapter, method: Any | None, session: Session) -> None:
        self.adapter, self.method, self.session = adapter, method, session
        self.inner, self.language = adapter.inner, adapter.language
        self.needs = set() if method is None else set(method.info.needs)
        self.policy = getattr(method, "positions", "gapless")
        if self.policy not in POLICIES:
            raise ThriftError(f"positions={self.policy!r} is no policy: there are {', '.join(POLICIES)}")
        self.features = Features(adapter, method, session, self._found)
        self.visual: Tensor | None = None
        self.placed: list[Placed] = []
        self._running = threading.local()
        self.forward: Callable[..., Any] = self.language.forward

    def attach(self, undo: ExitStack) -> None:
        if self.inner in _attached:
            raise ThriftError("another session is installed on this model; leave its with block first")
        undo.callback(_attached.discard, self.inner)
        _attached.add(self.inner)
        self.features.attach(undo)
        replace_method(self.inner, "forward", self._join, undo)
        self._wrapped = replace_method(self.language, "forward", self._read, undo)

    @contextmanager
    def lifted(self, undo: ExitStack) -> Iterator[None]:
        """What is put on the language model's ``forward`` while this is entered comes to lie under the connector."""
        plain, name = self.forward, "forward"
        self.language.forward = plain
        yield
        below = self.language.forward
        if below is not plain:
            self.forward = below
            undo.callback(setattr, self, "forward", plain)
            undo.callback(setattr, self.language, name, below)
        self.language.forward = self._wrapped

    # ---- joining images and text ------------------------------------------------------------------------------------

    @property
    def _now(self) -> Now | None:
        return getattr(self._running, "now", None)

    def _found(self, modality: str, pictures: Pictures, features: Any) -> None:
        if self._now is not None:
            check_placeholders(self.inner.config, self._now.ids, modality, features)
            self._now.pictures[modality] = pictures

    def _join(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The ``forward`` in which images and text are joined: note what is known of the prompt."""
        given = inspect.signature(plain).bind(*args, **kwargs).arguments if args else kwargs
        mask, before = given.get("attention_mask"), self._now
        now = Now(given.get("input_ids"), mask if isinstance(mask, Tensor) and mask.dim() == 2 else None, {})
        check_images_given(self.inner.config, given)
        for modality, out in (given.get("mm_encoder_outputs") or {}).items():
            if out is not None and getattr(out, "pooler_output", None) is not None:
                check_placeholders(self.inner.config, now.ids, modality, out.pooler_output)
                if self.method is not None or self.adapter.reduced:
                    now.pictures[modality] = self.features.noted(out)
        self._running.now = now
        try:
            return plain(*args, **kwargs)
        finally:
            self._running.now = before

    # ---- the language model -----------------------------------------------------------------------------------------

    def _read(self, _plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The language model's ``forward``: fewer tokens go in, as many hidden states as ever come out."""
        now, cache = self._now, kwargs.get("past_key_values")
        if now is None or args:  # called by itself
            return self.forward(*args, **kwargs)
        if self.method is None and not self.adapter.reduced:
            with self._showing(self._visual(now)):
                return self.forward(**kwargs)
        placed = self._place(now, kwargs["inputs_embeds"]) if now.pictures else []
        if not placed:
            return self._go_on(now, cache, kwargs) if isinstance(cache, ConnectorCache) else self.forward(**kwargs)
        start, self.placed = perf_counter(), placed
        real = self._real(now, kwargs)
        maps = self._decide(placed, kwargs["inputs_embeds"], real)
        before = sum(p.picture.n for p in placed)
        left = sum(int(map.mask[row].sum()) for map, row in maps)
        if self.method is not None:
            self.session.record("connector", before=before, after=left, seconds=perf_counter() - start)
        self.session.start_maps("connector")
        visual = columns_of(placed, real)
        whole = left == sum(p.picture.placeholders for p in placed) and all(map.is_identity for map, _ in maps)
        if whole and not isinstance(cache, ConnectorCache):
            self.session.add_map("connector", TokenMap.identity(real.shape[1], real.shape[:1], real.device))
            with self._showing(visual):
                return self.forward(**kwargs)
        check_cache(cache)
        map = prompt_map(placed, maps, real)
        self.session.add_map("connector", map)
        return self._shortened(now, cache, kwargs, map, real, visual, placed)

    def _visual(self, now: Now) -> Tensor | None:
        """``(batch, n)`` bool: the placeholders of a prompt; None where there are none."""
        if now.ids is None or now.ids.shape[1] < 2:
            return None
        visual = torch.zeros_like(now.ids, dtype=torch.bool)
        for modality in MODALITIES:
            visual |= now.ids == getattr(self.inner.config, f"{modality}_token_id", -1)
        return visual if bool(visual.any()) else None

    @contextmanager
    def _showing(self, visual: Tensor | None) -> Iterator[None]:
        self.visual = visual
        try:
            yield
        finally:
            self.visual = None

    def _place(self, now: Now, embeds: Tensor) -> list[Placed]:
        """Which columns each image has. Beams and other copies of a row have the images of that row."""
        out: list[Placed] = []
        for modality, pictures in now.pictures.items():
            mask = self._placeholders(modality, now.ids, embeds)
            total, slots = sum(p.placeholders for p in pictures.found), mask.nonzero()
            if not total or len(slots) % total:
                raise ThriftError(
                    f"{len(slots)} placeholders for {total} {modality} tokens: write as many as the images have"
                )
            copies, counts = len(slots) // total, mask.sum(1).tolist()
            number = at = 0
            for row in range(0, len(counts), copies):
                first, filled = number, 0
                while filled < counts[row]:
                    filled += pictures.found[number].placeholders
                    number += 1
                if filled > counts[row]:
                    raise ThriftError(
                        f"row {row} has {counts[row]} {modality} placeholders, its images have {filled} tokens: write "
                        "as many in the same row"
                    )
                for copy in range(row, row + copies):
                    for i in range(first, number):
                        picture = pictures.found[i]
                        span = slots[at : at + picture.placeholders, 1]
                        columns = span if picture.left is None else span[picture.left]
                        out.append(Placed(picture, copy, columns, span, i, pictures))
                        at += picture.placeholders
        return out

    def _placeholders(self, modality: str, ids: Tensor | None, embeds: Tensor) -> Tensor:
        token = getattr(self.inner.config, f"{modality}_token_id")
        if ids is None:
            raise ThriftError("connector=... finds images by their placeholders: give input_ids, not inputs_embeds")
        return (ids == token).to(embeds.device)

    def _real(self, now: Now, kwargs: dict[str, Any]) -> Tensor:
        """``(batch, n)`` bool: which columns of this forward are no padding."""
        batch, n = kwargs["inputs_embeds"].shape[:2]
        mask = now.mask
        if mask is None:
            given = kwargs.get("attention_mask")
            given = next((m for m in given.values() if m is not None), None) if isinstance(given, dict) else given
            mask = None if given is None else real_tokens(given) if given.dim() == 4 else given
        if mask is None:
            return torch.ones(batch, n, dtype=torch.bool, device=kwargs["inputs_embeds"].device)
        return mask[:, -n:].bool().expand(batch, n)

    # ---- deciding ---------------------------------------------------------------------------------------------------

    def _decide(self, placed: Sequence[Placed], embeds: Tensor, real: Tensor) -> list[tuple[TokenMap, int]]:
        """Of each image a map, and which row of it is the image's. Images that lie alike are decided together."""
        if self.method is None:
            return [(TokenMap.identity(p.picture.n, device=real.device), 0) for p in placed]
        by_layout: dict[Any, list[Placed]] = {}
        for p in placed:
            known = p.source.decided.get(p.number)
            if known is None or "text" in self.needs:
                by_layout.setdefault((id(p.source), p.picture.layout), []).append(p)
        out: dict[int, tuple[TokenMap, int]] = {}
        for group in by_layout.values():
            alike = group if "text" in self.needs else list({p.number: p for p in group}.values())
            view = self._view(alike, embeds, real)
            map = self.method.reduce(view.require(self.method.info.needs))
            view.forget()
            check_map(self.method.info.name, map, len(alike), alike[0].picture.n)
            for i, p in enumerate(alike):
                out[id(p)] = map, i
                p.source.decided[p.number] = map, i
        if "text" not in self.needs:
            for p in placed:
                p.source.parts = None  # what the encoder did need not be remembered while tokens are generated
        return [out.get(id(p), p.source.decided[p.number]) for p in placed]

    def _view(self, alike: Sequence[Placed], embeds: Tensor, real: Tensor) -> View:
        picture, parts = alike[0].picture, alike[0].source.parts
        shape, device = (len(alike), picture.n), embeds.device
        pictures = [p.picture for p in alike]
        protected = picture.protected
        rows = torch.tensor([p.row for p in alike], device=device)
        visual = columns_of(self.placed, real)
        view = View(
            features=Lazy(lambda: torch.stack([embeds[p.row, p.columns] for p in alike])),
            mask=Lazy(lambda: torch.ones(shape, dtype=torch.bool, device=device)),
            protected=Lazy(
                lambda: (
                    torch.zeros(shape, dtype=torch.bool, device=device)
                    if protected is None
                    else protected.to(device).expand(shape)
                )
            ),
            text=Lazy(lambda: text_of(embeds, real & ~visual, rows)[0]),
            text_mask=Lazy(lambda: text_of(embeds, real & ~visual, rows)[1]),
        )
        view.offer("layers", len(self.adapter.layers))
        if picture.segments:
            view.offer("segments", picture.segments)
        if len(picture.segments) == 1:
            only = picture.segments[0]
            view.offer("grid", (only.t, only.h, only.w))
        if parts is not None:
            view.offer("cls", lambda layer: parts.cls(layer, pictures))
            view.offer("received", lambda layer: parts.received(layer, pictures))
            view.offer("keys", lambda layer: parts.keys(layer, pictures))
            view.offer("hidden", lambda layer: parts.hidden(layer, pictures))
        return view

    # ---- fewer tokens -----------------------------------------------------------------------------------------------

    def _shortened(
        self,
        now: Now,
        cache: Any,
        kwargs: dict[str, Any],
        map: TokenMap,
        real: Tensor,
        visual: Tensor,
        placed: Sequence[Placed],
    ) -> Any:
        embeds, held = kwargs["inputs_embeds"], cache if isinstance(cache, ConnectorCache) else None
        batch, n = real.shape
        past = 0 if cache is None else int(cache.get_seq_length())
        columns = torch.where(map.mask, map.anchors, -1)
        index = columns.clamp(min=0)
        there = columns >= 0
        kept = real.new_zeros(batch, n + 1).scatter_(1, torch.where(there, columns, n), True)[:, :n]
        zero = torch.zeros(batch, dtype=torch.int64, device=real.device)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = (past + torch.arange(n, device=real.device)).expand(batch, n)
        positions = positions.expand(*positions.shape[:-2], batch, n)
        runs = runs_of(placed)
        shift, gone = (zero, zero) if held is None else (held.shift, held.gone)
        positions, shift, gone = drop_positions(positions, kept, real, runs, shift, gone, self.policy)
        at = index.expand(*positions.shape[:-1], -1)
        given = {
            **kwargs,
            "inputs_embeds": map.apply(embeds),
            "position_ids": positions.gather(-1, at).masked_fill(~there, 0),
        }
        before = torch.arange(past, device=real.device).expand(batch, past)
        if held is not None:
            before = torch.cat([held.columns, before[:, held.total :]], dim=1)
        everything = torch.cat([before, torch.where(there, columns + past, -1)], dim=1)
        window = getattr(self.language.config, "sliding_window", None)
        masks = kwargs.get("attention_mask")
        given["attention_mask"] = shorten_masks(masks, now.mask, everything, columns, cache, window)
        if given["attention_mask"] is None and self.policy == "original":
            # Without a mask and a cache, transformers takes gaps between positions for borders of packed texts.
            given["attention_mask"] = torch.ones_like(everything)
        short = visual.gather(1, index) & there
        if kwargs.get("deepstack_visual_embeds") is not None:
            given["visual_pos_masks"] = short
            given["deepstack_visual_embeds"] = [
                reduced_features(map, visual, features)[short] for features in kwargs["deepstack_visual_embeds"]
            ]
        self._count(batch, n, columns.shape[1], held, past)
        with self._showing(short), held.inside() if held is not None else nullcontext():
            out = self.forward(**given)
        filled = getattr(out, "past_key_values", None)
        if filled is not None:
            check_cache(filled)
            remember(filled, everything, past + n, shift, gone)
        return restored(out, columns, n)

    def _count(self, batch: int, n: int, left: int, held: ConnectorCache | None, past: int) -> None:
        """The session has counted a forward of all columns over what the layers hold."""
        costs = self.adapter.decoder.costs
        entries = past if held is None else past - held.dropped
        self.session.flops -= batch * (costs.flops(n, entries + n, 0) - costs.flops(left, entries + left, 0))
        self._count_dense(batch, n, held, past)

    def _count_dense(self, batch: int, n: int, held: ConnectorCache | None, past: int) -> None:
        if held is not None:
            costs, entries = self.adapter.decoder.costs, past - held.dropped
            self.session.flops_dense += batch * (costs.flops(n, past + n, 0) - costs.flops(n, entries + n, 0))

    def _go_on(self, now: Now, cache: ConnectorCache, kwargs: dict[str, Any]) -> Any:
        """A forward of tokens that all stay, with a cache of which some are gone."""
        batch, new = kwargs["inputs_embeds"].shape[:2]
        past, device = int(cache.get_seq_length()), kwargs["inputs_embeds"].device
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = (past + torch.arange(new, device=device)).expand(batch, new)
        if positions.dim() == 2:
            positions = positions - cache.shift.unsqueeze(1)
        else:
            axes = positions[-3:] - cache.shift.unsqueeze(1)
            positions = torch.cat([positions[:-3] - cache.gone.unsqueeze(1), axes])
        given = kwargs.get("attention_mask")
        if isinstance(given, dict) or (given is not None and given.dim() == 2):
            given = now.mask
        if given is None or given.dim() == 2:
            real = cache.real(given, new)
            mask = None if real is None else real.long()
        else:
            mask = cache.held(given)
        self._count_dense(batch, new, cache, past)
        with cache.inside():
            return self.forward(**{**kwargs, "position_ids": positions, "attention_mask": mask})
