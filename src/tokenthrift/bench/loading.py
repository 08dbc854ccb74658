"""The model to measure: loaded, named, and told from others by its weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..core.errors import ThriftError
from ..models.images import ImageProcessor

MODELS = {"language": "smollm2-135m", "vision": "dinov2-s", "visual": "thrift-vlm"}
"""The packs that are measured when no model is named, by kind."""


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with its tokenizer or image processor, and what reports call it."""

    label: str
    model: Any
    processor: Any

    @property
    def kind(self) -> str:
        """``visual`` for vision-language models, ``language`` for others that write, ``vision`` for encoders."""
        from ..models.multimodal import MultimodalAdapter

        if MultimodalAdapter.fits(self.model):
            return "visual"
        return "language" if hasattr(self.model, "generate") and self.model.can_generate() else "vision"

    @property
    def identity(self) -> str:
        """The model by its weights, not by its name: a folder's content may change."""
        parts = (
            f"{n}{tuple(p.shape)}{p.dtype}{p.detach().double().sum():.6e}" for n, p in self.model.named_parameters()
        )
        return f"{self.label} {digest([*parts, str(self.model.device)])}"


def load_model(model: Any, processor: Any, size: int | None = None) -> Loaded:
    """A pack, hub id, folder, or a loaded model with its ``processor``; images ``size`` pixels a side."""
    from ..models.packs import load
    from ..models.packs.loading import check_finite

    if not isinstance(model, str | os.PathLike):
        check_finite(model, type(model).__name__)
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        return Loaded(name, model.eval(), _sized(processor, size))
    loaded, companion = load(str(model))
    if isinstance(companion, ImageProcessor):  # the resolution the model is made for
        companion = replace(companion, size=getattr(loaded.config, "image_size", companion.size))
    return Loaded(str(model), loaded, _sized(companion, size))


def _sized(processor: Any, size: int | None) -> Any:
    if size is None:
        return processor
    if not isinstance(processor, ImageProcessor):
        raise ThriftError(f"the size of images cannot be set for a {type(processor).__name__}: set it there")
    return replace(processor, size=size)


def digest(parts: Iterable[str]) -> str:
    """A short fingerprint of some texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
