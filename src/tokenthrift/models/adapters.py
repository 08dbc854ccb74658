"""Which adapter fits a model. An adapter says where the stages are in a family; see ``core.session.Adapter``."""

from __future__ import annotations

from typing import Any

from ..core.errors import ThriftError
from ..core.session import Adapter


def adapter_for(model: Any) -> Adapter:
    """The adapter of a ``transformers`` model. Raises ThriftError, with what to do, if none fits."""
    from .decoder import DecoderAdapter
    from .encoder import EncoderAdapter
    from .layer_kinds import odd_layers
    from .multimodal import MultimodalAdapter
    from .multiview import MultiViewAdapter

    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    # A multi-view model holds an encoder of images too, and a vision-language model generates text: they come first.
    for adapter in (MultimodalAdapter, DecoderAdapter, MultiViewAdapter, EncoderAdapter):
        if adapter.fits(model):
            return adapter(model)
    odd = odd_layers(model) if getattr(model, "can_generate", lambda: False)() else {}
    why = f": its {next(iter(odd.values()))}" if odd else ""
    raise ThriftError(
        f"no adapter fits {type(model).__name__}{why}; supported are decoder-only language models whose attention "
        "dispatches through transformers' AttentionInterface, and encoders: DINOv2, ViT, DeiT, CLIP, SigLIP, timm's "
        "VisionTransformer, BERT, RoBERTa, DistilBERT (to add one, give models.encoder.FAMILIES a row), "
        "vision-language models (those in models.multimodal.FAMILIES), and multi-view transformers laid out as VGGT"
    )
