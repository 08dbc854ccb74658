"""One forward of a model over a text, of which every layer with full attention is measured: what calibrations share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .attention import Watcher, watch_attention
from .decoder import find_attentions

Note = Callable[[Any], None]
"""Takes what was found in one layer."""


def measure_layers(
    model: Any, ids: Tensor, make: Callable[[int, int, Note], Watcher], progress: Callable[[int, int], None] | None
) -> list[Any]:
    """What the watchers note, by layer; None for layers with a sliding window.

    Args:
        ids: ``(1, tokens)``.
        make: ``(layer, layers, note) -> watcher``, which calls ``note`` once.
        progress: called with the number of layers done and of all.
    """
    sliding = [getattr(layer, "is_sliding", False) for layer in DynamicCache(config=model.config).layers]
    modules = [m for m in find_attentions(model) if not sliding[int(m.layer_idx)]]  # type: ignore[arg-type]
    found: dict[int, Any] = {}

    def watcher(module: nn.Module) -> Watcher:
        layer = int(module.layer_idx)  # type: ignore[arg-type]

        def note(what: Any) -> None:
            found[layer] = what
            if progress is not None:
                progress(len(found), len(modules))

        return make(layer, len(sliding), note)

    with ExitStack() as undo, torch.inference_mode():
        watch_attention(modules, watcher, undo)
        model.base_model(input_ids=ids.to(model.device), use_cache=False)
    return [found.get(layer) for layer in range(len(sliding))]


def written(model: Any, tokens: int, seed: int) -> Tensor:
    """``(1, tokens)``: what the model writes when it may choose freely."""
    config = model.generation_config
    start = next((t for t in (config.bos_token_id, config.eos_token_id) if isinstance(t, int)), 0)
    ids = torch.tensor([[start]], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        text: Tensor = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens - 1,
            min_new_tokens=tokens - 1,  # an end of text does not end it
            do_sample=True,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
        )
    return text
