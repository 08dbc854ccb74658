"""Sentence embeddings with an encoder such as the minilm-l6 pack: mean over the real tokens, unit length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenthrift.core.errors import ThriftError


@torch.inference_mode()
def embed(
    texts: Sequence[str],
    model: Any,
    tokenizer: Any,
    *,
    batch_size: int = 32,
    max_length: int = 256,
    unit: bool = True,
) -> Tensor:
    """One row per text: (len(texts), hidden) float32 on the CPU, each of length 1 if `unit`, in the order given.

    Texts are cut at `max_length` tokens (256 is what all-MiniLM-L6-v2 was trained for) and batched by length, so that
    little of a batch is padding; the result does not depend on it beyond rounding. Raises ThriftError if `texts` is a
    single string or holds something else than strings.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ThriftError("embed takes a list of strings")
    if batch_size < 1:
        raise ThriftError(f"batch_size must be at least 1, got {batch_size}")
    result = torch.empty(len(texts), model.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer(
            [texts[row] for row in rows], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        ).to(model.device)
        hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        result[rows] = (torch.nn.functional.normalize(mean, dim=-1) if unit else mean).cpu()
    return result
