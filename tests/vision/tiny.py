"""Tiny random vision encoders, to run methods on."""

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from models.encoders import TimmLike, spread

TINY = {"hidden_size": 24, "num_attention_heads": 2, "image_size": 40, "patch_size": 8}
ENCODERS = {
    "dinov2": (lambda layers: Dinov2Model(Dinov2Config(**TINY, num_hidden_layers=layers, layerscale_value=0.7)), 1),
    "registers": (
        lambda layers: Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**TINY, num_hidden_layers=layers, num_register_tokens=3)
        ),
        4,
    ),
    "vit": (lambda layers: ViTModel(ViTConfig(**TINY, num_hidden_layers=layers, intermediate_size=48)), 1),
    "deit": (lambda layers: DeiTModel(DeiTConfig(**TINY, num_hidden_layers=layers, intermediate_size=48)), 2),
    "clip": (
        lambda layers: CLIPVisionModel(CLIPVisionConfig(**TINY, num_hidden_layers=layers, intermediate_size=48)),
        1,
    ),
    "timm": (lambda layers: TimmLike(depth=layers), 1),
    "siglip": (
        lambda layers: SiglipVisionModel(SiglipVisionConfig(**TINY, num_hidden_layers=layers, intermediate_size=48)),
        0,
    ),
}
"""How to build them, and how many tokens are no patches."""
RETURN_TOKENS = [name for name in ENCODERS if name != "timm"]
"""Those that return what is left of the tokens, and no logits."""


def build(name, attention="sdpa", layers=3):
    torch.manual_seed(0)
    return spread(ENCODERS[name][0](layers).eval(), attention)


def run(model, seed=1):
    """The last hidden state (or what the model returns) of two images of 25 patches."""
    images = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(seed))
    out = model(images)
    return getattr(out, "last_hidden_state", out)
