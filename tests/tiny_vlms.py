"""Tiny random vision-language models of every supported family, and inputs for them, made without processors."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

IMAGE, VIDEO = 90, 91
_TEXT = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
_CLIP = {**_VIT, "model_type": "clip_vision_model", "image_size": 48, "patch_size": 8, "projection_dim": 32}
_TOKENS = {"image_token_id": IMAGE, "image_token_index": IMAGE, "tie_word_embeddings": False}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_QWEN = {**_TOKENS, "video_token_id": VIDEO, "vision_start_token_id": 92, "vision_end_token_id": 93}
FAMILIES = {
    "llava": {
        **_TOKENS,
        "vision_config": _CLIP,
        "text_config": {**_TEXT, "model_type": "llama"},
        "image_seq_length": 36,
    },
}


def tiny_vlm(family: str, attention: str = "sdpa", seed: int = 0, **changes: object) -> torch.nn.Module:
    """A random model of the family; weights are scaled up so that attention is far from uniform."""
    values = {**FAMILIES[family], **changes}
    config = AutoConfig.for_model(values.pop("type", family), **values)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
    return model


def images(count: int, size: int = 48, seed: int = 0) -> torch.Tensor:
    """Random pixels."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def row(*parts: int | list[int]) -> list[int]:
    """Ids: a number is an image of so many tokens, a list is text."""
    return [i for part in parts for i in ([IMAGE] * part if isinstance(part, int) else part)]


def batch(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Rows padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}
