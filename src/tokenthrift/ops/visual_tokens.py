"""Choosing among visual tokens, beside those that have to stay."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.tokenmap import TokenMap
from .topk import keep_top


def keep_beside(scores: Tensor, budget: Budget, mask: Tensor, protected: Tensor) -> TokenMap:
    """Keep the best-scored tokens of each image in their order, and all protected ones, which the budget leaves out.

    Args:
        scores: ``(images, tokens)``.
        budget: of the tokens that are not protected; of each image at least one stays.
        mask, protected: ``(images, tokens)`` bool.

    Returns:
        A selection over ``(images,)``.
    """
    protected = protected & mask
    counts = budget.tokens_of((mask & ~protected).sum(1)) + protected.sum(1)
    scores = scores.to(torch.float32).masked_fill(protected, torch.inf)
    kept = keep_top(scores.unsqueeze(1), counts, mask).kept.squeeze(1)
    return TokenMap.keep(kept & mask)
