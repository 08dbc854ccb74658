"""What a draft model's attention says of a prompt's tokens (SpecPC, arXiv 2506.08373): one score a token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad


def score_of_layer(attention: Tensor, reduction: str, weighted: bool) -> Tensor:
    """What one layer says: ``(batch, heads, queries, keys)`` to ``(batch, keys)``.

    Args:
        attention: of the prompt's last queries, or of one written token.
        reduction: ``max`` or ``mean`` over heads and queries; the mean is left as a sum, which ranks alike.
        weighted: several queries count from 0 for the first to 1 for the last.
    """
    if attention.shape[2] > 1 and weighted:
        attention = attention * torch.linspace(0, 1, attention.shape[2], device=attention.device)[:, None]
    return attention.amax((1, 2)) if reduction == "max" else attention.sum((1, 2))


def score_of_steps(steps: list[list[Tensor]], reduction: str) -> Tensor:
    """What all layers say at all steps, the prompt's first: ``(batch, tokens)``; keys of written tokens are cut off."""
    n = steps[0][0].shape[-1]
    stacked = torch.stack([torch.stack([layer[:, :n] for layer in layers]) for layers in steps])
    return stacked.amax((0, 1)) if reduction == "max" else stacked.sum((0, 1))


def smoothed(scores: Tensor, kernel: int, pool: str) -> Tensor:
    """``(batch, tokens)``, pooled along the prompt by ``max`` or ``mean`` over ``kernel`` tokens; ``none``: as is."""
    if pool == "none":
        return scores
    left = (kernel - 1) // 2
    pooling = max_pool1d if pool == "max" else avg_pool1d
    return pooling(pad(scores, (left, kernel - 1 - left)), kernel, stride=1)
