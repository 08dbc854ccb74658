"""Attention of a few query rows over many keys: what ranking tokens needs, without the N×N matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_rows(queries: Tensor, keys: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Causal softmax attention of the last queries, in float32.

    Args:
        queries: ``(batch, heads, rows, dim)``, the queries of the last ``rows`` of the ``n`` tokens.
        keys: ``(batch, kv_heads, n, dim)``; ``heads`` is a multiple of ``kv_heads``, groups are consecutive heads.
        scaling: factor on ``q·k``.
        mask: ``(batch, n)`` bool, true for real tokens. Padding keys get 0, and rows of padding queries are all 0.

    Returns:
        ``(batch, heads, rows, n)`` float32.
    """
    batch, heads, rows, dim = queries.shape
    kv_heads, n = keys.shape[1], keys.shape[2]
    grouped = queries.reshape(batch, kv_heads, -1, dim)  # the query heads of a group share their keys: one matmul
    logits = (grouped.to(torch.float32) * scaling) @ keys.to(torch.float32).transpose(-1, -2)
    logits = logits.view(batch, heads, rows, n)
    position = torch.arange(n, device=keys.device)
    hidden = position > position[n - rows :, None]  # (rows, n): keys after the query
    if mask is not None:
        hidden = hidden | ~mask[:, None, None, :]
        hidden = hidden & mask[:, None, n - rows :, None]  # a padding query sees all, so that its row has no NaN …
    out = logits.masked_fill_(hidden, float("-inf")).softmax(-1)
    return out if mask is None else out * mask[:, None, n - rows :, None]  # … and then counts for nothing


def group_mean(scores: Tensor, kv_heads: int) -> Tensor:
    """Mean over the query heads that share a key/value head: ``(batch, heads, …)`` to ``(batch, kv_heads, …)``."""
    return scores.reshape(scores.shape[0], kv_heads, -1, *scores.shape[2:]).mean(2)
