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
_SIGLIP = {**_VIT, "model_type": "siglip_vision_model", "image_size": 48, "patch_size": 8, "vision_use_head": False}
_LLAMA, _QWEN2 = {**_TEXT, "model_type": "llama"}, {**_TEXT, "model_type": "qwen2"}
_PINPOINTS = [[48, 96], [96, 48], [96, 96]]
FAMILIES = {
    "llava": {**_TOKENS, "vision_config": _CLIP, "text_config": _LLAMA, "image_seq_length": 36},
    "llava_next": {
        **_TOKENS,
        "vision_config": _CLIP,
        "text_config": _LLAMA,
        "image_grid_pinpoints": _PINPOINTS,
        "image_seq_length": 36,
    },
    "llava_onevision": {
        **_TOKENS,
        "video_token_id": VIDEO,
        "vision_config": _SIGLIP,
        "text_config": _QWEN2,
        "image_grid_pinpoints": _PINPOINTS,
        "vision_aspect_ratio": "anyres_max_2",
    },
    "qwen2_vl": {
        **_QWEN,
        "vision_config": {
            "depth": 3,
            "embed_dim": 32,
            "hidden_size": 48,
            "num_heads": 4,
            "patch_size": 4,
            "mlp_ratio": 2,
        },
        "text_config": {**_TEXT, "rope_parameters": _ROPE},
    },
    "qwen2_5_vl": {
        **_QWEN,
        "vision_config": {
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": 48,
            "num_heads": 4,
            "intermediate_size": 48,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        "text_config": {**_TEXT, "rope_parameters": _ROPE},
    },
    "qwen3_vl": {
        **_QWEN,
        "vision_config": {
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": 48,
            "num_heads": 4,
            "intermediate_size": 48,
            "patch_size": 4,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        "text_config": {**_TEXT, "rope_parameters": _ROPE},
    },
    "internvl": {
        **_TOKENS,
        "vision_config": {**_VIT, "model_type": "internvl_vision", "image_size": [48, 48], "patch_size": [4, 4]},
        "text_config": _QWEN2,
        "downsample_ratio": 0.5,
    },
    "smolvlm": {
        **_TOKENS,
        "vision_config": {**_VIT, "model_type": "smolvlm_vision", "image_size": 48, "patch_size": 4},
        "text_config": _LLAMA,
        "scale_factor": 2,
    },
    "idefics3": {
        **_TOKENS,
        "vision_config": {**_VIT, "model_type": "idefics3_vision", "image_size": 48, "patch_size": 4},
        "text_config": _LLAMA,
        "scale_factor": 2,
    },
    "gemma3": {
        **_TOKENS,
        "vision_config": {**_SIGLIP, "patch_size": 4},
        "text_config": {
            **_TEXT,
            "model_type": "gemma3_text",
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 8,
        },
        "mm_tokens_per_image": 36,
    },
}
"""An image of 48 x 48 pixels is 36 tokens in each of them, but those that pack crops."""
EVERY = tuple(FAMILIES)


def tiny_vlm(family: str, attention: str = "sdpa", seed: int = 0, **changes: object) -> torch.nn.Module:
    """A random model of the family; weights are scaled up so that attention is far from uniform."""
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
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


def pictured(family: str, rows: list[list[int]], count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of a family with ``count`` images of 48 x 48 pixels (36 tokens each) for these rows, in their order."""
    inputs = batch(rows)
    pixels = images(count, seed=seed)
    ids = inputs["input_ids"]
    if family in ("llava_next", "llava_onevision"):
        raise ValueError("their images are packed: use packed()")
    if "qwen" in family:
        grid = torch.tensor([[1, 12, 12]] * count)
        kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        return {**inputs, "pixel_values": patches(pixels), "image_grid_thw": grid, "mm_token_type_ids": kinds}
    if family in ("smolvlm", "idefics3"):
        per_row = [r.count(IMAGE) // 36 for r in rows]
        padded = torch.zeros(len(rows), max(per_row), 3, 48, 48)
        at = 0
        for i, n in enumerate(per_row):
            padded[i, :n] = pixels[at : at + n]
            at += n
        return {**inputs, "pixel_values": padded}
    if family == "gemma3":
        return {**inputs, "pixel_values": pixels, "token_type_ids": (ids == IMAGE).long()}
    return {**inputs, "pixel_values": pixels}


ROWS = [row([5, 6], 36, [7, 8, 9]), row([3, 4], 36, [5, 6, 7], 36, [8])]
"""A batch with one image, and two."""


def alone(family: str, r: int) -> dict[str, torch.Tensor]:
    """The inputs of one row of ROWS, with the images that it has in the batch."""
    whole = pictured(family, ROWS, 3)
    one = pictured(family, [ROWS[r]], ROWS[r].count(IMAGE) // 36)
    counts = [1, 2]
    at, n = sum(counts[:r]), counts[r]
    if "qwen" in family:
        one["pixel_values"] = whole["pixel_values"][at * 144 : (at + n) * 144]
    elif family in ("smolvlm", "idefics3"):
        one["pixel_values"] = whole["pixel_values"][r : r + 1, :n]
    else:
        one["pixel_values"] = whole["pixel_values"][at : at + n]
    return one


_CROPS = {(48, 96): 3, (96, 48): 3, (96, 96): 5, (28, 96): 3}
"""Images of these sizes are so many images of 48 x 48 pixels, the first of them the whole."""


def packed(
    sizes: list[tuple[int, int]], family: str = "llava_next"
) -> tuple[torch.nn.Module, dict[str, torch.Tensor], list[int]]:
    """A model that packs crops, its inputs for images of these sizes, and how many tokens each of them has."""
    model = tiny_vlm(family)
    crops = [_CROPS[size] for size in sizes]
    pixels = torch.zeros(len(sizes), max(crops), 3, 48, 48)
    for i, n in enumerate(crops):
        pixels[i, :n] = images(n, seed=i)
    of_images = torch.tensor(sizes)
    with torch.no_grad():
        lengths = [len(f) for f in model.model.get_image_features(pixels, of_images).pooler_output]
    return model, {"pixel_values": pixels, "image_sizes": of_images}, lengths


def prompted(family: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model of any family, and a batch of a row with one image and a row with two."""
    if family not in ("llava_next", "llava_onevision"):
        return tiny_vlm(family), pictured(family, ROWS, 3)
    model, given, (a, b, c) = packed([(96, 48), (28, 96), (48, 96)], family)
    return model, {**batch([row([5, 6], a, [7, 8, 9]), row([3, 4], b, [5, 6, 7], c, [8])]), **given}


def patches(pixels: torch.Tensor, side: int = 4, block: int = 2) -> torch.Tensor:
    """Flat patches in the order of Qwen's processors: blocks of 2 x 2, each patch twice in time."""
    n, c, h, w = pixels.shape
    x = pixels.view(n, c, h // side // block, block, side, w // side // block, block, side)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return x.reshape(n * (h // side) * (w // side), -1)
