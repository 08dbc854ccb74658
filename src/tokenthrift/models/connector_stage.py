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
from dataclasses import dataclass, field
from functools import partial, reduce, wraps
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
from .connector_masks import shorten_masks
from .connector_positions import POLICIES, Run, drop_positions
from .encoder_parts import EncoderParts, watching_layers
from .pictures import Picture, Seen

if TYPE_CHECKING:
    from .multimodal import MultimodalAdapter

MODALITIES = ("image", "video")
_NOTE = "_tokenthrift_pictures"
_attached: WeakSet[Any] = WeakSet()
"""Models on which a session is installed."""


@dataclass(eq=False)
class Pictures:
    """The images of one call of the model's ``get_image_features``, and what the encoder did with them."""

    found: list[Picture]
    shape: tuple[int, int] | None = None
    """Rows of the encoder, and patches in each."""
    parts: EncoderParts | None = None
    decided: dict[int, tuple[TokenMap, int]] = field(default_factory=dict)
    """By image: the map of its layout's images, and which row of it."""


@dataclass(frozen=True, eq=False)
class Placed:
    """An image in a prompt.

    Attributes:
        picture: how its tokens lie.
        row: of the batch.
        columns: ``(n,)`` int64, where its tokens stand in the prompt, as the user wrote it.
        span: ``(placeholders,)`` int64, all of its placeholders: more than tokens where the encoder was reduced.
        number: of the image among those of its kind.
    """

    picture: Picture
    row: int
    columns: Tensor
    span: Tensor
    number: int
    source: Pictures

    def patches(self) -> TokenMap:
        """From the encoder's patches ``(1, rows · patches)``, all those of its call, to the image's tokens; tokens
        that come from no patch are padding.

        Raises:
            ThriftError: the encoder was reduced (its own map is ``provenance()["vision"]``), or is not known.
        """
        if self.picture.pool is None or self.source.shape is None:
            raise ThriftError("which patches stand behind these tokens is not known: see provenance()['vision']")
        rows, patches = self.source.shape
        each = torch.eye(rows * patches).view(rows, patches, -1)
        return TokenMap.transform(self.picture.pool(each)[None])


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
        self.encoder_layers: list[int] = []
        if hasattr(method, "encoder_layers") and adapter.layers:
            count = len(adapter.layers)
            self.encoder_layers = list(method.encoder_layers(count))  # type: ignore[union-attr]
            if bad := [i for i in self.encoder_layers if not -count <= i < count]:
                raise ThriftError(
                    f"{method.info.name} asks for layer {bad[0]} of an encoder with {count} layers: "  # type: ignore[union-attr]
                    f"name some of 0 to {count - 1}"
                )
        self._check_encoder()
        self.visual: Tensor | None = None
        self.placed: list[Placed] = []
        self._running = threading.local()
        self.forward: Callable[..., Any] = self.language.forward

    def _check_encoder(self) -> None:
        asked = sorted(self.needs & {"cls", "received", "keys", "hidden", "segments", "grid"})
        steps = self.session.plan.at("vision")
        if asked and steps and (self.adapter.reduced or set(asked) - {"segments", "grid"}):
            name, other = self.method.info.name, steps[0].info.name  # type: ignore[union-attr]
            raise ThriftError(
                f"connector={name} looks at {asked[0]!r} of an encoder whose tokens vision={other} reduces: "
                "leave out one of them, or use a method that needs features only, such as divprune"
            )

    def attach(self, undo: ExitStack) -> None:
        if self.inner in _attached:
            raise ThriftError("another session is installed on this model; leave its with block first")
        undo.callback(_attached.discard, self.inner)
        _attached.add(self.inner)
        for modality in MODALITIES:
            name = f"get_{modality}_features"
            if hasattr(self.inner, name):
                _replace(self.inner, name, partial(self._features, modality == "video"), undo)
        _replace(self.inner, "forward", self._join, undo)
        self._wrapped = _replace(self.language, "forward", self._read, undo)

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

    # ---- the encoder ------------------------------------------------------------------------------------------------

    def _features(self, video: bool, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``get_image_features`` or ``get_video_features``: note the layout of what comes out."""
        if getattr(self._running, "encoding", False):  # one of these may call the other
            return plain(*args, **kwargs)
        self._running.encoding = True
        packed: dict[str, Any] = {}
        layers, which = self.adapter.layers, self.encoder_layers
        try:
            with ExitStack() as undo:
                if hasattr(self.inner, "pack_image_features"):
                    _replace(self.inner, "pack_image_features", partial(_note_packing, packed), undo)
                watched = undo.enter_context(watching_layers(layers, which, self.needs)) if which else {}
                out = plain(*args, **kwargs)
        finally:
            self._running.encoding = False
        if not hasattr(out, "pooler_output"):
            return out
        given = inspect.signature(plain).bind(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        lengths = [len(features) for features in out.pooler_output]
        seen = Seen(self.inner, given, lengths, packed or None, video)
        found = self.adapter.family.read(seen)
        pictures = Pictures(found, seen.shape(len(found)))
        if self.adapter.reduced:
            pictures = self._spaced(out, seen, found)
        elif watched:
            pictures.parts = self._parts(watched, seen)
        setattr(out, _NOTE, pictures)
        now = self._now
        if now is not None:
            now.pictures["video" if video else "image"] = pictures
        return out

    def _parts(self, watched: dict[int, Any], seen: Seen) -> EncoderParts:
        config = self.inner.config.vision_config
        flat = hasattr(config, "spatial_merge_size")
        prefix, unit, order = 0, 1, None
        if flat:
            unit = int(config.spatial_merge_size) ** 2
            if hasattr(config, "window_size"):
                from transformers.vision_utils import get_vision_window_index

                grid = seen.given["video_grid_thw" if "video_grid_thw" in seen.given else "image_grid_thw"]
                order, _ = get_vision_window_index(
                    grid, config.spatial_merge_size, config.window_size, config.patch_size
                )
        else:
            h, w = seen.grid(seen.pixels)
            one = next(iter(watched.values()))
            tokens = one.calls[0][1].shape[-2] if one.calls else one.hidden.shape[-2]
            prefix = max(tokens - h * w, 0)
        name = type(self.adapter.encoder).__name__
        return EncoderParts(watched, len(self.adapter.layers), prefix, flat, unit, order, name)

    def _spaced(self, out: Any, seen: Seen, found: list[Picture]) -> Pictures:
        """Where the encoder was reduced: put the features that are left where they stand among the placeholders.

        What is between them is nothing, and is dropped when images and text are joined."""
        strategy = seen.given.get("vision_feature_select_strategy")
        strategy = strategy or getattr(self.inner.config, "vision_feature_select_strategy", None)
        cut = int(strategy == "default")
        features = list(out.pooler_output)
        map = _map_of(self.session.maps("vision"), len(features[0]) + cut)
        if map is None or len(map.source) != len(features):
            raise ThriftError(
                "the vision stage reduced other layers than those that the connector reads: use a single feature layer"
            )
        n, spaced, pictures = map.n_in - cut, [], []
        for row, of_image in enumerate(features):
            real = map.mask[row, cut:]
            at, order = (map.anchors[row, cut:][real] - cut).sort()
            whole = of_image.new_zeros(n, of_image.shape[-1])
            whole[at] = of_image[real][order]
            spaced.append(whole)
            pictures.append(found[row] if len(at) == n else Picture(len(at), left=at, whole=n))
        out.pooler_output = spaced
        return Pictures(pictures)

    # ---- joining images and text ------------------------------------------------------------------------------------

    @property
    def _now(self) -> Now | None:
        return getattr(self._running, "now", None)

    def _join(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The ``forward`` in which images and text are joined: note what is known of the prompt."""
        given = inspect.signature(plain).bind(*args, **kwargs).arguments if args else kwargs
        mask, before = given.get("attention_mask"), self._now
        now = Now(given.get("input_ids"), mask if isinstance(mask, Tensor) and mask.dim() == 2 else None, {})
        outputs = given.get("mm_encoder_outputs")
        if isinstance(outputs, dict) and (self.method is not None or self.adapter.reduced):
            for modality, out in outputs.items():
                if out is not None and getattr(out, "pooler_output", None) is not None:
                    now.pictures[modality] = self._noted(out)
        self._running.now = now
        try:
            return plain(*args, **kwargs)
        finally:
            self._running.now = before

    def _noted(self, out: Any) -> Pictures:
        found: Pictures | None = getattr(out, _NOTE, None)
        if found is None:
            raise ThriftError(
                "connector=... has not seen how these image features were made: make them inside the with block, and "
                "leave out prefill_chunk_size, which cuts images apart"
            )
        return found

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
        visual = _at(placed, real)
        if left == sum(p.picture.placeholders for p in placed) and all(map.is_identity for map, _ in maps):
            self.session.add_map("connector", TokenMap.identity(real.shape[1], real.shape[:1], real.device))
            with self._showing(visual):
                return self._go_on(now, cache, kwargs) if isinstance(cache, ConnectorCache) else self.forward(**kwargs)
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
            _check_map(self.method.info.name, map, len(alike), alike[0].picture.n)
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
        visual = _at(self.placed, real)
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
            text=Lazy(lambda: _text(embeds, real & ~visual, rows)[0]),
            text_mask=Lazy(lambda: _text(embeds, real & ~visual, rows)[1]),
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
        kept = torch.zeros_like(real).scatter_(1, index, there)
        zero = torch.zeros(batch, dtype=torch.int64, device=real.device)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = (past + torch.arange(n, device=real.device)).expand(batch, n)
        positions = positions.expand(*positions.shape[:-2], batch, n)
        runs = _runs(placed)
        shift, gone = (zero, zero) if held is None else (held.shift, held.gone)
        positions, shift, gone = drop_positions(positions, kept, real, runs, shift, gone, self.policy)
        at = index.expand(*positions.shape[:-1], -1)
        given = {
            **kwargs,
            "inputs_embeds": map.apply(embeds),
            "position_ids": positions.gather(-1, at).masked_fill(~there, 0),
        }
        given["attention_mask"] = self._masks(now, kwargs, held, cache, columns, past)
        short = visual.gather(1, index) & there
        if kwargs.get("deepstack_visual_embeds") is not None:
            given["visual_pos_masks"] = short
            given["deepstack_visual_embeds"] = [
                _deep(map, visual, features)[short] for features in kwargs["deepstack_visual_embeds"]
            ]
        self._count(batch, n, columns.shape[1], held, past)
        with self._showing(short), held.inside() if held is not None else nullcontext():
            out = self.forward(**given)
        filled = getattr(out, "past_key_values", None)
        if filled is not None:
            check_cache(filled)
            whole = columns
            if past:
                old = torch.arange(past, device=real.device).expand(batch, past) if held is None else held.columns
                if held is not None:
                    later = torch.arange(held.total, past, device=real.device).expand(batch, -1)
                    old = torch.cat([old, later], dim=1)
                whole = torch.cat([old, torch.where(there, columns + past, -1)], dim=1)
            remember(filled, whole, past + n, shift, gone)
        return _restored(out, columns, n)

    def _masks(
        self, now: Now, kwargs: dict[str, Any], held: ConnectorCache | None, cache: Any, columns: Tensor, past: int
    ) -> Any:
        """The mask of the tokens that are left, over what the cache holds and them."""
        batch, device = columns.shape[0], columns.device
        before = torch.arange(past, device=device).expand(batch, past)
        if held is not None:
            later = torch.arange(held.total, past, device=device).expand(batch, -1)
            before = torch.cat([held.columns, later], dim=1)
        everything = torch.cat([before, torch.where(columns >= 0, columns + past, -1)], dim=1)
        window = getattr(self.language.config, "sliding_window", None)
        return shorten_masks(kwargs.get("attention_mask"), now.mask, everything, columns, cache, window)

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


def prompt_map(placed: Sequence[Placed], maps: Sequence[tuple[TokenMap, int]], real: Tensor) -> TokenMap:
    """The map of a whole prompt, ``(batch,)`` over its columns, from those of its images.

    Text stays, padding goes; rows that keep fewer tokens have their padding in front. Where several outputs of an
    image have one anchor, the later ones stand at the next columns.
    """
    batch, n = real.shape
    device = real.device
    text = real & ~_at(placed, real)
    rows: list[list[tuple[Tensor, Tensor, Tensor, Tensor]]] = [[] for _ in range(batch)]
    for p, (map, i) in zip(placed, maps, strict=True):
        outputs = map.mask[i].nonzero().squeeze(-1)
        anchors, order = map.anchors[i, outputs].sort(stable=True)
        column = p.columns[_distinct(anchors, map.n_in)]
        slot = torch.full((map.n_out,), -1, device=device)
        slot[outputs[order]] = column  # an output is known by its column from here on
        target = map.target[i]
        edge = (target >= 0).nonzero().squeeze(-1)
        weight = map.weight[i, edge]
        rows[p.row].append((p.columns[map.source[i, edge]], slot[target[edge]], weight, column))
    edges = []
    for row, parts in enumerate(rows):
        own = text[row].nonzero().squeeze(-1)
        source, at, weight, column = (
            torch.cat(ts) for ts in zip(*parts, (own, own, torch.ones(len(own), device=device), own), strict=True)
        )
        column = column.sort().values
        edges.append((source, torch.searchsorted(column, at), weight, column))
    width, most = max(len(e[3]) for e in edges), max(len(e[0]) for e in edges)
    plain = all(bool((e[2] == 1).all()) and len(e[0]) == len(e[3]) for e in edges)
    index = torch.full((batch, width), -1, device=device)
    for row, (*_, column) in enumerate(edges):
        index[row, width - len(column) :] = column
    if plain and all(bool((e[0].sort().values == e[3]).all()) for e in edges):
        return TokenMap.select(index, n)
    source = torch.zeros(batch, most, dtype=torch.int64, device=device)
    target, weights = torch.full_like(source, -1), torch.zeros(batch, most, device=device)
    for row, (of, to, weight, column) in enumerate(edges):
        source[row, : len(of)], weights[row, : len(of)] = of, weight
        target[row, : len(of)] = to + width - len(column)
    return TokenMap(source, target, weights, n_in=n, n_out=width, anchor=index.clamp(min=0))


def _distinct(anchors: Tensor, n: int) -> Tensor:
    """Ascending numbers below ``n``, none of them twice, as near to the given ones as that allows."""
    steps = torch.arange(len(anchors), device=anchors.device)
    pushed = (anchors - steps).cummax(0).values + steps
    return torch.minimum(pushed, n - len(anchors) + steps)


def _at(placed: Sequence[Placed], like: Tensor) -> Tensor:
    """``(batch, n)`` bool: the columns of images."""
    out = torch.zeros_like(like)
    for p in placed:
        out[p.row, p.span] = True
    return out


def _text(embeds: Tensor, text: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The text tokens of rows, aligned to the left: ``(rows, T, dim)`` and ``(rows, T)``."""
    map = TokenMap.keep(text[rows])
    return map.apply(embeds[rows]), map.mask


def _runs(placed: Sequence[Placed]) -> list[Run]:
    """The runs of columns of images, in ascending order."""
    out = []
    for p in placed:
        columns = p.span
        breaks = (columns.diff() != 1).nonzero().squeeze(-1) + 1
        for part in columns.tensor_split(breaks.cpu()):
            out.append(Run(p.row, int(part[0]), int(part[-1]) + 1))
    return sorted(out, key=lambda run: (run.row, run.start))


def _deep(map: TokenMap, visual: Tensor, features: Tensor) -> Tensor:
    """Features of the visual tokens, ``(visual tokens, dim)``, as the prompt's map makes them: ``(batch, m, dim)``."""
    whole = features.new_zeros(*visual.shape, features.shape[-1])
    whole[visual] = features
    return map.apply(whole)


def _restored(out: Any, columns: Tensor, n: int) -> Any:
    """Hidden states at all columns: a dropped one shows that of the last column before it that was kept."""
    slots = torch.arange(columns.shape[1], device=columns.device).expand(columns.shape)
    back = torch.full((len(columns), n + 1), -1, device=columns.device)
    back.scatter_(1, torch.where(columns >= 0, columns, n), slots)
    back = back[:, :n].cummax(1).values

    def restore(hidden: Tensor) -> Tensor:
        index = back.clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, index).masked_fill((back < 0).unsqueeze(-1), 0)

    out.last_hidden_state = restore(out.last_hidden_state)
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = tuple(restore(h) for h in out.hidden_states)
    return out


def _map_of(maps: Sequence[TokenMap], left: int) -> TokenMap | None:
    """The map of the encoder's layers up to that whose output has so many tokens."""
    for count in range(1, len(maps) + 1):
        if maps[count - 1].n_out == left:
            return reduce(TokenMap.then, maps[:count])
    if maps and maps[0].n_in == left:  # the layers that are read come before any reduction
        return TokenMap.identity(left, maps[0].lead, maps[0].device)
    return None


def _check_map(name: str, map: TokenMap, images: int, n: int) -> None:
    if map.lead != (images,) or map.n_in != n:
        raise ThriftError(f"{name} gave a map over {(*map.lead, map.n_in)} for {images} images of {n} tokens")
    if not bool(map.mask.any(-1).all()):
        raise ThriftError(f"{name} leaves nothing of an image: raise its budget to at least one token")


def _note_packing(packed: dict[str, Any], plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(plain).bind(*args, **kwargs).arguments
    shapes = [torch.empty(*f.shape[:2], 0, device=f.device) for f in given["image_features"]]
    packed.update({**given, "image_features": shapes})
    return plain(*args, **kwargs)


def _replace(owner: Any, name: str, wrapper: Callable[..., Any], undo: ExitStack) -> Callable[..., Any]:
    """Put ``wrapper``, which is given the plain function first, in the place of a method of one object."""
    plain, own = getattr(owner, name), name in vars(owner)

    @wraps(plain)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return wrapper(plain, *args, **kwargs)

    undo.callback(partial(setattr, owner, name, plain) if own else partial(vars(owner).pop, name, None))
    setattr(owner, name, replaced)
    return replaced
