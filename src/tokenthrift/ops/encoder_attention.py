"""Attention inside encoders, where every token sees every other: what ranking tokens needs, never the N×N matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def row_attention(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Softmax attention of one query: ``(batch, heads, dim)`` and ``(batch, heads, n, dim)`` to ``(batch, heads, n)``,
    float32."""
    logits = (query.to(torch.float32) * scaling).unsqueeze(-2) @ keys.to(torch.float32).transpose(-1, -2)
    return logits.squeeze(-2).softmax(-1)


def received_attention(queries: Tensor, keys: Tensor, scaling: float, block: int = 256) -> Tensor:
    """Attention that each token receives from all queries, summed over these, mean over heads; ``block`` rows at once.

    Args:
        queries, keys: ``(batch, heads, n, dim)``.
        scaling: factor on ``q·k``.
        block: how many rows of the matrix exist at once.

    Returns:
        ``(batch, n)`` float32; each row sums to the number of queries.
    """
    wide = keys.to(torch.float32).transpose(-1, -2)
    received = wide.new_zeros(keys.shape[0], keys.shape[-2])
    for start in range(0, queries.shape[-2], block):
        rows = queries[..., start : start + block, :]
        received += ((rows.to(torch.float32) * scaling) @ wide).softmax(-1).sum(-2).mean(1)
    return received
