"""From scores to the tokens that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.tokenmap import TokenMap


def keep_top(scores: Tensor, budget: Budget | Tensor, mask: Tensor) -> TokenMap:
    """Keep the best-scored real tokens of each row, in their order.

    Args:
        scores: ``(batch, heads, tokens)``; ``+inf`` forces a token in.
        budget: how many of a row's real tokens to keep, or a count a row ``(batch,)``; rows with fewer keep all.
        mask: ``(batch, tokens)`` bool, true for real tokens; padding is never kept.

    Returns:
        A selection over ``(batch, heads)``; rows that keep fewer tokens than the fullest end in padding outputs.
    """
    n = scores.shape[-1]
    lengths = mask.sum(-1)
    counts = budget.tokens_of(lengths) if isinstance(budget, Budget) else budget
    counts = torch.minimum(counts.to(scores.device), lengths)
    if bool((counts == lengths).all()):  # nothing to drop: leave padding where it is, so that no bit changes
        return TokenMap.identity(n, scores.shape[:-1], scores.device)
    k = int(counts.max())
    ranked = scores.masked_fill(~mask.unsqueeze(1), float("-inf")).topk(k, dim=-1).indices
    spare = (
        torch.arange(k, device=scores.device) >= counts[:, None, None]
    )  # a short row's worse picks, padding among them
    index = torch.where(spare, n, ranked).sort(dim=-1).values  # n sorts them to the end
    return TokenMap.select(torch.where(index == n, -1, index), n)


def keep_top_of_all_heads(scores: Tensor, counts: Tensor, floor: Tensor, mask: Tensor) -> TokenMap:
    """Keep the best-scored real tokens of all heads of a row together, in their order; heads keep different numbers.

    Args:
        scores: ``(batch, heads, tokens)``, comparable between heads.
        counts: ``(batch,)``, how many of a row's tokens to keep, mean over its heads; at most its real tokens.
        floor: ``(batch,)``, how many each head keeps at least.
        mask: ``(batch, tokens)``, or ``(batch, heads, tokens)`` where heads differ: true for real tokens; padding is
            never kept.

    Returns:
        A selection over ``(batch, heads)``; heads that keep fewer tokens than the fullest end in padding outputs.
    """
    mask = mask.unsqueeze(1) if mask.dim() == 2 else mask
    scores = scores.masked_fill(~mask, float("-inf"))
    safe = best_of_each_head(scores, floor[:, None])
    return TokenMap.keep(best_of_all_heads(scores.masked_fill(safe & mask, float("inf")), counts))


def best_of_all_heads(scores: Tensor, counts: Tensor) -> Tensor:
    """Which of ``(batch, heads, tokens)`` are among the best ``heads * counts`` of a row, ``counts`` ``(batch,)``."""
    return (_ranks(scores.flatten(1)) < (scores.shape[1] * counts)[:, None]).view(scores.shape)


def best_of_each_head(scores: Tensor, counts: Tensor) -> Tensor:
    """Which of ``(batch, heads, tokens)`` are among the best ``counts`` ``(batch, heads)`` of their head."""
    return _ranks(scores) < counts.unsqueeze(-1)


def _ranks(scores: Tensor) -> Tensor:
    """The place of each score along the last dimension, 0 for the highest."""
    return scores.argsort(dim=-1, descending=True).argsort(dim=-1)


def top_entries(scores: Tensor, count: int, mask: Tensor | None) -> Tensor:
    """Indices of the best-scored entries, in no order: ``(batch, heads, n)`` to ``(batch, heads, count)``.

    Padding, false in ``mask`` ``(batch, n)``, comes only where a row has too few real entries.
    """
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
    return scores.topk(count, sorted=False).indices


def top_mask(scores: Tensor, counts: Tensor, mask: Tensor) -> Tensor:
    """The best-scored tokens of each row, of equals the earlier ones.

    Args:
        scores: ``(batch, tokens)``, finite or ``+inf``.
        counts: ``(batch,)`` int64, how many.
        mask: ``(batch, tokens)`` bool, the tokens that may be among them.

    Returns:
        ``(batch, tokens)`` bool.
    """
    order = scores.to(torch.float32).masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(scores.shape[-1], device=scores.device) < counts.unsqueeze(-1)
    return torch.zeros_like(mask).scatter(-1, order, first) & mask
