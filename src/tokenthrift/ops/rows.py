"""The rows of a padded batch, each by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def score_rows(score: Callable[..., Tensor], mask: Tensor, *parts: Tensor) -> Tensor:
    """Apply ``score`` to each row's real tokens alone: for methods that count tokens, or blocks of them.

    Args:
        score: takes as many tensors as there are ``parts`` and returns ``(batch, heads, tokens)``.
        mask: ``(batch, n)`` bool, true for real tokens.
        parts: ``(batch, heads, n, dim)`` each.

    Returns:
        ``(batch, heads, n)`` float32, ``-inf`` at padding. A batch without padding is scored in one call.
    """
    if bool(mask.all()):
        return score(*parts)
    out = torch.full(parts[0].shape[:-1], float("-inf"), device=parts[0].device)
    for row, real in enumerate(mask):
        out[row, :, real] = score(*(part[row : row + 1, :, real] for part in parts))[0]
    return out


def age(mask: Tensor) -> Tensor:
    """``(batch, n)``: real tokens from each token to the row's end, itself included: 1 for the newest."""
    return mask.flip(-1).cumsum(-1).flip(-1).clamp(min=1)
