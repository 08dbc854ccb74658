"""Around a model's own ``get_image_features``: how the visual tokens lie that come out, and what the encoder did."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import torch

from ..core.costs import linear_flops
from ..core.errors import ThriftError
from ..core.session import Session
from ..core.tokenmap import TokenMap
from .connector_maps import Pictures
from .encoder_parts import EncoderParts, watching_layers
from .pictures import Picture, Seen
from .replacing import replace_method
from .visual_inputs import MODALITIES, check_pixels, why_refused

if TYPE_CHECKING:
    from .multimodal import MultimodalAdapter

_NOTE = "_tokenthrift_pictures"


class Features:
    """Notes :class:`~tokenthrift.models.connector_maps.Pictures` on what the model's functions return.

    Args:
        found: is told the modality, which pictures of it were made, and their features.

    Raises:
        ThriftError: the method asks for layers that the encoder does not have, or for what a vision method changes.
    """

    def __init__(
        self,
        adapter: MultimodalAdapter,
        method: Any | None,
        session: Session,
        found: Callable[[str, Pictures, Any], None],
    ) -> None:
        self.adapter, self.inner, self.session, self.found = adapter, adapter.inner, session, found
        self.needs = set() if method is None else set(method.info.needs)
        self.which: list[int] = []
        self._running = threading.local()
        if method is not None:
            self._check(method)

    def _check(self, method: Any) -> None:
        name, layers = method.info.name, self.adapter.layers
        if hasattr(method, "encoder_layers") and layers:
            self.which = list(method.encoder_layers(len(layers)))
        if bad := [i for i in self.which if not -len(layers) <= i < len(layers)]:
            raise ThriftError(
                f"{name} asks for layer {bad[0]} of an encoder with {len(layers)} layers: name some of 0 to "
                f"{len(layers) - 1}"
            )
        asked = sorted(self.needs & {"cls", "received", "keys", "hidden", "segments", "grid"})
        steps = self.session.plan.at("vision")
        if asked and steps and (self.adapter.reduced or set(asked) - {"segments", "grid"}):
            other = steps[0].info.name
            raise ThriftError(
                f"connector={name} looks at {asked[0]!r} of an encoder whose tokens vision={other} reduces: "
                "leave out one of them, or use a method that needs features only, such as divprune"
            )

    def attach(self, undo: ExitStack) -> None:
        """Stand around the model's functions until ``undo`` closes."""
        for modality in MODALITIES:
            name = f"get_{modality}_features"
            if hasattr(self.inner, name):
                replace_method(self.inner, name, partial(self._make, modality), undo)

    def _make(self, modality: str, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``get_image_features`` or ``get_video_features``: note the layout of what comes out."""
        if getattr(self._running, "encoding", False):  # one of these may call the other
            return plain(*args, **kwargs)
        given = inspect.signature(plain).bind(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        check_pixels(given)
        self._running.encoding = True
        packed: dict[str, Any] = {}
        layers, which = self.adapter.layers, self.which
        try:
            with ExitStack() as undo:
                if hasattr(self.inner, "pack_image_features"):
                    replace_method(self.inner, "pack_image_features", partial(_note_packing, packed), undo)
                watched = undo.enter_context(watching_layers(layers, which, self.needs)) if which else {}
                out = plain(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            why = why_refused(self.inner.config, given)
            if why is None or isinstance(error, ThriftError):
                raise
            raise ThriftError(f"{why}: make them with the model's own processor") from error
        finally:
            self._running.encoding = False
        if not hasattr(out, "pooler_output"):
            return out
        lengths = [len(features) for features in out.pooler_output]
        seen = Seen(self.inner, given, lengths, packed or None, modality == "video")
        found = self.adapter.family.read(seen)
        pictures = Pictures(found, seen.shape(len(found)))
        if self.adapter.reduced:
            pictures = self._spaced(out, seen, found)
        elif watched:
            pictures.parts = self._parts(watched, seen)
        setattr(out, _NOTE, (self, pictures))
        self.found(modality, pictures, out.pooler_output)
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
        map = map_up_to(self.session.maps("vision"), len(features[0]) + cut)
        if map is None or len(map.source) != len(features):
            raise ThriftError(
                "the vision stage reduced other layers than those that the connector reads: use a single feature layer"
            )
        n, spaced, pictures = map.n_in - cut, [], []
        spared = len(features) * (n - len(features[0]))
        self.session.flops_dense += linear_flops(self.inner.multi_modal_projector, spared)
        for row, of_image in enumerate(features):
            real = map.mask[row, cut:]
            at, order = (map.anchors[row, cut:][real] - cut).sort()
            whole = of_image.new_zeros(n, of_image.shape[-1])
            whole[at] = of_image[real][order]
            spaced.append(whole)
            pictures.append(found[row] if len(at) == n else Picture(len(at), left=at, whole=n))
        out.pooler_output = spaced
        return Pictures(pictures)

    def noted(self, out: Any) -> Pictures:
        """The pictures behind features that the model's function returned in this session.

        Raises:
            ThriftError: it did not, so that nobody watched as they were made.
        """
        maker, found = getattr(out, _NOTE, (None, None))
        if maker is not self or found is None:
            raise ThriftError(
                "connector=... has not seen how these image features were made: make them inside the with block, and "
                "leave out prefill_chunk_size, which cuts images apart"
            )
        return found  # type: ignore[no-any-return]


def map_up_to(maps: Sequence[TokenMap], left: int) -> TokenMap | None:
    """The map of the encoder's layers up to that whose output has so many tokens."""
    for count in range(1, len(maps) + 1):
        if maps[count - 1].n_out == left:
            return reduce(TokenMap.then, maps[:count])
    if maps and maps[0].n_in == left:  # the layers that are read come before any reduction
        return TokenMap.identity(left, maps[0].lead, maps[0].device)
    return None


def _note_packing(packed: dict[str, Any], plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(plain).bind(*args, **kwargs).arguments
    shapes = [torch.empty(*f.shape[:2], 0, device=f.device) for f in given["image_features"]]
    packed.update({**given, "image_features": shapes})
    return plain(*args, **kwargs)
