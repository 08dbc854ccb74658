"""The adapter of vision-language models: where each family has its encoder, and how its visual tokens lie."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ..core.costs import DecoderCosts, linear_flops
from ..core.errors import ThriftError
from ..core.session import Session
from .decoder import DecoderAdapter, find_attentions
from .encoder import EncoderAdapter, find_encoder, has, part
from .pictures import Picture, Seen, read_blocks, read_merged, read_packed, read_rows
from .replacing import replace_method
from .visual_costs import install_visual_counter


@dataclass(frozen=True, kw_only=True)
class VisionLanguage:
    """Where the parts of a family are: paths of modules from the model inside the one that generates."""

    classes: tuple[str, ...]
    """Names of the class that generates."""
    encoder: str = "vision_tower"
    language: str = "language_model"
    layers: str | None = None
    """The encoder's layers, from the encoder; None = as :data:`tokenthrift.models.encoder.FAMILIES` says."""
    read: Callable[[Seen], list[Picture]]
    """How the layout of images is read."""
    flexible: bool = False
    """The connector takes any number of tokens, so that the encoder's may be reduced."""
    restored: bool = False
    """The connector reads the encoder's last hidden state, which may be copied back to all patches."""


FAMILIES = (
    VisionLanguage(classes=("LlavaForConditionalGeneration",), read=read_rows, flexible=True),
    VisionLanguage(
        classes=("LlavaNextForConditionalGeneration", "LlavaOnevisionForConditionalGeneration"), read=read_packed
    ),
    VisionLanguage(
        classes=(
            "Qwen2VLForConditionalGeneration",
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen3VLForConditionalGeneration",
        ),
        encoder="visual",
        layers="blocks",
        read=read_merged,
    ),
    VisionLanguage(classes=("InternVLForConditionalGeneration",), layers="encoder.layer", read=read_blocks),
    VisionLanguage(
        classes=("SmolVLMForConditionalGeneration", "Idefics3ForConditionalGeneration"),
        encoder="vision_model",
        language="text_model",
        layers="encoder.layers",
        read=read_blocks,
    ),
    VisionLanguage(classes=("Gemma3ForConditionalGeneration",), read=read_blocks, restored=True),
)


class LanguageAdapter(DecoderAdapter):
    """A vision-language model for the stages that act on its language model."""

    def __init__(self, model: Any, language: nn.Module) -> None:
        super().__init__(model)
        self.language, self.attentions = language, find_attentions(language)

    @cached_property
    def costs(self) -> DecoderCosts:
        head = self.model.get_output_embeddings()
        inside = head is not None and any(m is head for m in self.language.modules())
        per_token = linear_flops(self.language) - (linear_flops(head) if inside else 0)
        return replace(DecoderCosts.of(self.model), per_token=per_token)


class PromptAdapter(DecoderAdapter):
    """The language model itself, whose prompts are embeddings of text and of images."""

    def __init__(self, adapter: MultimodalAdapter) -> None:
        super().__init__(adapter.language)
        self.visual, self.count = adapter.visual, adapter.decoder.count  # type: ignore[method-assign]


class MultimodalAdapter:
    """Models of the :data:`FAMILIES`: images become tokens of a language model.

    The ``connector`` stage reduces these tokens between the two (:mod:`.connector_stage`); ``prefill``, ``cache``,
    ``attention`` and ``decode`` act on the language model, ``vision`` on the encoder.

    ``session.provenance()["connector"]`` maps, for the last prompt with images, its columns ``(batch, n)`` to those
    that the language model got; a cache's maps go on from there. :meth:`pictures` says which columns show which image,
    and how its tokens lie.
    """

    stages: tuple[str, ...] = ("vision", "connector", *DecoderAdapter.stages)

    def __init__(self, model: Any) -> None:
        self.model = model
        self.family = family_of(model)
        self.inner = inner_of(model)
        self.encoder: Any = part(self.inner, self.family.encoder)
        self.language: Any = part(self.inner, self.family.language)
        self.decoder = LanguageAdapter(model, self.language)
        self.reader = PromptAdapter(self)
        self._connector: Any = None
        self._attached = self._counting = False
        self.reduced = False
        """Whether the encoder returns fewer tokens than patches."""

    @classmethod
    def fits(cls, model: Any) -> bool:
        """True for models of a known family."""
        return any(type(model).__name__ in family.classes for family in FAMILIES)

    @property
    def layers(self) -> list[nn.Module]:
        """The encoder's layers; empty if they are not known."""
        path = self.family.layers
        if path is None:
            found = find_encoder(self.encoder)
            if found is None:
                return []
            encoder, family = found
            return list(part(encoder, family.layers))
        return list(part(self.encoder, path)) if has(self.encoder, path) else []

    def visual(self) -> Tensor | None:
        """``(batch, n)`` bool: which columns of the prompt that runs now in the language model are visual; None where
        none are, or none runs."""
        return None if self._connector is None else self._connector.visual

    def pictures(self) -> list[Any]:
        """The images of the last prompt: :class:`~tokenthrift.models.connector_maps.Placed`, with ``row``, the
        ``columns`` of the prompt as the user wrote it, and ``picture.segments``."""
        return [] if self._connector is None else self._connector.placed

    def install(self, stage: str, methods: list[Any], session: Session, undo: ExitStack) -> None:
        """See :class:`tokenthrift.core.session.Adapter`."""
        if len(methods) > 1:
            raise ThriftError(f"stage '{stage}' takes one method at a time here, the plan has {len(methods)}")
        from .connector_stage import install_connector

        visual = "visual" in methods[0].info.needs
        if not self._counting:
            undo.callback(setattr, self, "_counting", False)
            self._counting = True
            install_visual_counter(self, session, undo)
        if stage == "vision":
            self._install_vision(methods[0], session, undo)
        joins = stage == "vision" and self.reduced and not {"connector", "prefill"} & set(session.plan.stages)
        if stage == "connector" or joins or (stage == "prefill" and visual and not self._attached):
            undo.callback(setattr, self, "_attached", False)
            self._attached = True
            method = methods[0] if stage == "connector" else None
            self._connector = install_connector(self, method, session, undo)
        self.decoder.count(session, undo)
        if stage in ("vision", "connector"):
            return
        if stage != "prefill":
            self.decoder.install(stage, methods, session, undo)
        elif visual:
            # What the language model gets is decided before its prompt is looked at.
            with self._connector.lifted(undo):
                self.reader.install(stage, methods, session, undo)
        else:
            self._install_for_text(methods[0], session, undo)

    def _install_for_text(self, method: Any, session: Session, undo: ExitStack) -> None:
        """A prefill method that reads prompts of text: those with images are refused."""

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise ThriftError(
                f"prefill={method.info.name} reads prompts of text, and this one has images: use connector=..., or a "
                "prefill method that drops visual tokens"
            )

        if {"vision", "connector"} & set(session.plan.stages):
            refuse()
        for name in ("get_image_features", "get_video_features"):
            if hasattr(self.inner, name):
                replace_method(self.inner, name, refuse, undo)
        self.decoder.install("prefill", [method], session, undo)

    def _install_vision(self, method: Any, session: Session, undo: ExitStack) -> None:
        name, kind = f"vision={method.info.name}", type(self.model).__name__
        found = find_encoder(self.encoder)
        if found is None:
            raise ThriftError(
                f"{name} does not know {type(self.encoder).__name__}: reduce behind the encoder with connector=..."
            )
        around = getattr(method, "placement", "between") == "around"
        if not (self.family.flexible or self.family.restored or around):
            raise ThriftError(
                f"the connector of {kind} needs the whole grid of patches, which {name} reduces: use connector=..., or "
                "a vision method that acts around a sub-layer"
            )
        layers = getattr(self.model.config, "vision_feature_layer", None)
        if isinstance(layers, list | tuple) and not around:
            raise ThriftError(
                f"{name} leaves other tokens in each of the layers {list(layers)} that {kind} reads: use connector=..."
            )
        adapter = EncoderAdapter(self.encoder if self.family.flexible else self.model)
        undo.callback(setattr, self, "reduced", False)
        self.reduced = self.family.flexible and not around
        adapter.install("vision", [method], session, undo)


def family_of(model: Any) -> VisionLanguage:
    """The row of :data:`FAMILIES` for a model."""
    return next(family for family in FAMILIES if type(model).__name__ in family.classes)


def inner_of(model: Any) -> Any:
    """The model that joins images and text, inside the one that generates."""
    return model.model
