"""Attention inside encoders, where every token sees every other: what ranking tokens needs, never the N×N matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def row_attention(query: Tensor, keys: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of one query: ``(batch, heads, dim)`` and ``(batch, heads, n, dim)`` to ``(batch, heads, n)``,
    float32. ``mask`` ``(batch, n)`` bool is false for padding."""
    return _attend(query.unsqueeze(-2), keys.to(torch.float32).transpose(-1, -2), scaling, mask).squeeze(-2)


def received_attention(
    queries: Tensor, keys: Tensor, scaling: float, mask: Tensor | None = None, block: int = 256
) -> Tensor:
    """Attention that each token receives from all queries, summed over these, mean over heads; ``block`` rows at once.

    Args:
        queries, keys: ``(batch, heads, n, dim)``.
        scaling: factor on ``q·k``.
        mask: ``(batch, n)`` bool, false for padding: it receives nothing and gives nothing.
        block: how many rows of the matrix exist at once.

    Returns:
        ``(batch, n)`` float32; each row sums to the number of queries.
    """
    wide = keys.to(torch.float32).transpose(-1, -2)
    received = wide.new_zeros(keys.shape[0], keys.shape[-2])
    for start in range(0, queries.shape[-2], block):
        rows = _attend(queries[..., start : start + block, :], wide, scaling, mask)
        if mask is not None:
            rows = rows * mask[:, None, start : start + block, None]
        received += rows.sum(-2).mean(1)
    return received


def _attend(queries: Tensor, keys: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    logits = (queries.to(torch.float32) * scaling) @ keys
    if mask is not None:
        logits = logits.masked_fill_(~mask[:, None, None], -torch.inf)
    return logits.softmax(-1)
