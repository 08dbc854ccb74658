"""The adapter of vision encoders: where the parts of each family are. What happens there: ``vision_stage``."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from ..core.errors import ThriftError
from ..core.session import Session


@dataclass(frozen=True)
class Family:
    """Where the parts of an encoder are: paths of modules, from the encoder or (the last four) from each layer.

    The layers take ``(hidden_states, attention_mask, ...)`` and return hidden states.
    """

    classes: tuple[str, ...]
    patches: str
    """The convolution that makes the patch tokens."""
    layers: str
    attention: str
    """Has ``q_proj``, ``k_proj`` and ``head_dim``."""
    norm: str
    """The norm in front of the MLP."""
    mlp: str = "mlp"
    pool: str | None = None
    """A module inside the encoder that pools over all tokens; it is given the merged tokens copied back."""


FAMILIES = (
    Family(
        classes=("Dinov2Model", "Dinov2WithRegistersModel"),
        patches="embeddings.patch_embeddings.projection",
        layers="encoder.layer",
        attention="attention",
        norm="norm2",
    ),
    Family(
        classes=("ViTModel",),
        patches="embeddings.patch_embeddings.projection",
        layers="layers",
        attention="attention",
        norm="layernorm_after",
    ),
    Family(
        classes=("CLIPVisionModel",),
        patches="embeddings.patch_embedding",
        layers="encoder.layers",
        attention="self_attn",
        norm="layer_norm2",
    ),
    Family(
        classes=("SiglipVisionModel",),
        patches="embeddings.patch_embedding",
        layers="encoder.layers",
        attention="self_attn",
        norm="layer_norm2",
        pool="head",
    ),
)


class EncoderAdapter:
    """Vision encoders of the :data:`FAMILIES`, on their own or inside a model with a head.

    On its own an encoder returns the tokens that are left; ``session.provenance()["vision"]`` maps back:

        with tokenthrift.apply("vision=tome(keep=0.25)", model) as session:
            tokens = model(pixel_values).last_hidden_state            # (batch, 1 + patches / 4, dim)
        dense = session.provenance()["vision"].unmerge(tokens)        # (batch, 1 + patches, dim)

    Inside another model it returns them copied back to all positions, so that heads which average tokens, or reshape
    them to a grid, count every patch.
    """

    stages: tuple[str, ...] = ("vision",)

    def __init__(self, model: Any) -> None:
        found = find_encoder(model)
        if found is None:
            raise ThriftError(f"{type(model).__name__} has no vision encoder of a known family")
        self.model = model
        self.encoder, self.family = found

    @classmethod
    def fits(cls, model: Any) -> bool:
        """True for models that are, or hold, an encoder of a known family."""
        return find_encoder(model) is not None

    @property
    def layers(self) -> list[nn.Module]:
        return list(part(self.encoder, self.family.layers))

    def install(self, stage: str, methods: list[Any], session: Session, undo: ExitStack) -> None:
        """See :class:`tokenthrift.core.session.Adapter`."""
        if len(methods) > 1:
            raise ThriftError(f"stage '{stage}' takes one method at a time here, the plan has {len(methods)}")
        from .vision_stage import install_vision

        install_vision(self, methods[0], session, undo)


def find_encoder(model: Any) -> tuple[Any, Family] | None:
    """The first vision encoder of a known family in ``model``, which may be the model itself."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        names = {cls.__name__ for cls in type(module).__mro__}
        for family in FAMILIES:
            if names.intersection(family.classes):
                return module, family
    return None


def part(module: nn.Module, path: str) -> Any:
    """The module at a dotted path inside another."""
    return attrgetter(path)(module)
