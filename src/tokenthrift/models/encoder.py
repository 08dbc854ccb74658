"""The adapter of encoders: where the parts of each family are. What happens there: ``vision_stage``."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from inspect import signature
from operator import attrgetter
from typing import Any

from torch import nn

from ..core.errors import ThriftError
from ..core.session import Session


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the parts of an encoder are: paths of modules, from the encoder or (those below ``layers``) from a layer.

    The layers take ``(hidden_states, mask, ...)``, the mask by position or by the name ``mask``, and return hidden
    states.
    """

    classes: tuple[str, ...] = ()
    """Names of the encoder's class; a subclass fits too."""
    shape: tuple[str, ...] = ()
    """Instead of classes: paths that the encoder must have (models outside transformers). Its layers must take the mask
    by name."""
    patches: str | None = None
    """The convolution that makes the patch tokens; None = an encoder of text."""
    layers: str
    attention: str = "attention"
    """The module that computes attention, without residual and norm."""
    query: str = "attention.q_proj"
    key: str = "attention.k_proj"
    """Where queries and keys come out, ``(batch, tokens, heads * head_dim)``; the same path if they are fused."""
    first_norm: str | None = None
    """The norm in front of attention; None in post-norm layers."""
    norm: str
    """The norm in front of the MLP; in post-norm layers the module whose output the MLP gets."""
    mlp: str = "mlp"
    """The MLP; unused in post-norm layers."""
    pool: str | None = None
    """A module inside the encoder that pools over all tokens; it is given the merged tokens copied back."""
    restore: str | None = None
    """A module after the layers from which on the tokens must have their old number again."""
    mask: str = "attention_mask"
    causal: bool = False

    @property
    def text(self) -> bool:
        """Whether the tokens are those of a text: the output has the old length, since masks and labels do."""
        return self.patches is None

    @property
    def post_norm(self) -> bool:
        return self.first_norm is None


_SELF = {
    "layers": "encoder.layers", "attention": "self_attn", "query": "self_attn.q_proj", "key": "self_attn.k_proj",
    "first_norm": "layer_norm1", "norm": "layer_norm2",
}  # fmt: skip

FAMILIES = (
    Family(
        classes=("Dinov2Model", "Dinov2WithRegistersModel"),
        patches="embeddings.patch_embeddings.projection",
        layers="encoder.layer",
        first_norm="norm1",
        norm="norm2",
    ),
    Family(
        classes=("ViTModel", "DeiTModel"),
        patches="embeddings.patch_embeddings.projection",
        layers="layers",
        first_norm="layernorm_before",
        norm="layernorm_after",
    ),
    Family(classes=("CLIPVisionModel",), patches="embeddings.patch_embedding", **_SELF),  # type: ignore[arg-type]
    Family(classes=("SiglipVisionModel",), patches="embeddings.patch_embedding", pool="head", **_SELF),  # type: ignore[arg-type]
    Family(  # timm's VisionTransformer (ViT, DeiT and relatives)
        # ls1: its other layers, which are no pre-norm layers, have none
        shape=("patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.ls1", "blocks.0.norm2", "blocks.0.mlp", "norm"),
        patches="patch_embed.proj",
        layers="blocks",
        attention="attn",
        query="attn.qkv",
        key="attn.qkv",
        first_norm="norm1",
        norm="norm2",
        restore="norm",
        mask="attn_mask",
    ),
    Family(classes=("CLIPTextModel",), restore="final_layer_norm", causal=True, **_SELF),  # type: ignore[arg-type]
    Family(
        classes=("BertModel", "RobertaModel", "XLMRobertaModel"),
        layers="encoder.layer",
        attention="attention.self",
        query="attention.self.query",
        key="attention.self.key",
        norm="attention.output",
    ),
    Family(
        classes=("DistilBertModel",),
        layers="transformer.layer",
        query="attention.q_lin",
        key="attention.k_lin",
        norm="sa_layer_norm",
    ),
)
"""Images first: of a model that has both encoders the one for images is reduced."""


class EncoderAdapter:
    """Encoders of the :data:`FAMILIES`, on their own or inside a model with a head.

    On its own a vision encoder returns the tokens that are left; ``session.provenance()["vision"]`` maps back:

        with tokenthrift.apply("vision=tome(keep=0.25)", model) as session:
            tokens = model(pixel_values).last_hidden_state            # (batch, 1 + patches / 4, dim)
        dense = session.provenance()["vision"].unmerge(tokens)        # (batch, 1 + patches, dim)

    Inside another model it returns them copied back to all positions, so that heads which average tokens, or reshape
    them to a grid, count every patch. Encoders of text and timm's models always do.
    """

    stages: tuple[str, ...] = ("vision",)

    def __init__(self, model: Any) -> None:
        found = find_encoder(model)
        if found is None:
            raise ThriftError(f"{type(model).__name__} has no encoder of a known family")
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
    """The encoder in ``model``, which may be the model itself: the first module of the first family found."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    names = [{cls.__name__ for cls in type(module).__mro__} for module in modules]
    for family in FAMILIES:
        for module, classes in zip(modules, names, strict=True):
            if classes.intersection(family.classes) or _has_shape(module, family):
                return module, family
    return None


def _has_shape(module: nn.Module, family: Family) -> bool:
    if not family.shape or not all(has(module, path) for path in family.shape):
        return False
    return all(family.mask in signature(layer.forward).parameters for layer in part(module, family.layers))


def part(module: nn.Module, path: str) -> Any:
    """The module at a dotted path inside another."""
    return attrgetter(path)(module)


def has(module: nn.Module, path: str) -> bool:
    """Whether there is a module at this path."""
    try:
        part(module, path)
    except AttributeError:
        return False
    return True
