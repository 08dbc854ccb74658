"""A random DINOv2 of a few thousand parameters, saved like any model, and noisy little images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from tokenthrift.models.images import ImageProcessor

PROCESSOR = ImageProcessor(size=48, patch=8)
"""36 patches."""


def tiny_encoder(layers: int = 4) -> Any:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=layers, num_attention_heads=2, image_size=48, patch_size=8,
        layerscale_value=0.7,
    )  # fmt: skip
    model = Dinov2Model(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:  # large enough to tell tokens apart
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    return model


def save_encoder(folder: Path) -> Path:
    tiny_encoder().save_pretrained(folder)
    return folder


def save_images(folder: Path, count: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        noise = np.random.default_rng(seed).integers(0, 255, (5, 5, 3)).astype("uint8")
        Image.fromarray(noise).resize((48, 48)).save(folder / f"{seed}.png")
    return folder
