"""Attention that leaves out heads and values, and reads keys in two parts (SpAtten, arXiv 2012.09852)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..core.budget import Budget

BITS, LATER_BITS = 12, 4
"""Of a key's channels: in all, and those that are read only where the others are not enough."""


def of_heads(
    queries: Tensor, keys: Tensor, values: Tensor, heads: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Some of the heads of everything that attention takes, each with keys and values of its own.

    Args:
        queries: ``(batch, heads, q, dim)``.
        keys, values: ``(batch, kv_heads, n, dim)``.
        heads: ``(batch, some)`` int64, the query heads wanted.
        mask: ``(batch or 1, heads or 1, q, n)`` or None.
    """
    row = torch.arange(len(queries), device=queries.device)[:, None]
    shared = heads // (queries.shape[1] // keys.shape[1])
    if mask is not None and mask.shape[1] > 1:
        mask = mask.expand(len(queries), -1, -1, -1)[row, heads]
    return queries[row, heads], keys[row, shared], values[row, shared], mask


def attend_all(queries: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Plain attention, causal where there is no mask and several queries: ``(batch, heads, q, dim of values)``."""
    causal = mask is None and queries.shape[2] > 1
    return scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal, scale=scaling)


def attend_top_values(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    share: float = 1.0,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query over all keys, and over the values of its most probable entries only.

    The probabilities are those over all entries: what the others had is lost, as nothing is normalised again.

    Args:
        queries: ``(batch, heads, 1, dim)``.
        keys, values: ``(batch, kv_heads, n, dim)``; ``heads`` is a multiple of ``kv_heads``.
        scaling: factor on ``q·k``.
        mask: ``(batch or 1, heads or 1, 1, n)``, boolean or additive.
        share: of the values, that each head reads.
        threshold: keys are those of :func:`two_part_keys`, and their lower bits count where the highest probability is
            below this without them; None = the keys as they are.

    Returns:
        ``(batch, heads, 1, dim of values)``; and ``(batch, heads)`` bool, where the lower bits counted.
    """
    batch, heads, _, dim = queries.shape
    kv_heads, n = keys.shape[1:3]

    def probabilities(keys: Tensor) -> Tensor:
        grouped = queries.reshape(batch, kv_heads, -1, dim).to(torch.float32) * scaling
        logits = (grouped @ keys.to(torch.float32).transpose(-1, -2)).view(batch, heads, 1, n)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        return logits.squeeze(2).softmax(-1)

    if threshold is None:
        seen = probabilities(keys)
        unsure = torch.zeros(batch, heads, dtype=torch.bool, device=keys.device)
    else:
        first, whole = two_part_keys(keys)
        seen = probabilities(first)
        unsure = seen.amax(-1) < threshold
        if bool(unsure.any()):
            seen = torch.where(unsure.unsqueeze(-1), probabilities(whole), seen)
    if share == 1:
        weights = seen.to(values.dtype).view(batch, kv_heads, -1, n)
        return (weights @ values).view(batch, heads, 1, -1), unsure
    lengths = torch.full((batch,), n, device=keys.device)
    if mask is not None:
        visible = mask if mask.dtype == torch.bool else mask >= 0
        lengths = visible[:, 0, 0].sum(-1).expand(batch)
    counts = Budget(ratio=share).tokens_of(lengths)
    best = seen.topk(int(counts.max()), dim=-1)  # descending: a shorter row's worse picks come last
    spare = torch.arange(best.values.shape[-1], device=keys.device) >= counts[:, None, None]
    row = torch.arange(batch, device=keys.device)[:, None, None]
    shared = torch.arange(heads, device=keys.device)[:, None] // (heads // kv_heads)
    weights = best.values.masked_fill(spare, 0).to(values.dtype)
    return weights.unsqueeze(2) @ values[row, shared, best.indices], unsure


def two_part_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys as their higher bits alone say, and as all bits say: a simulation, nothing is stored in fewer bits.

    Each entry of each head is scaled by its largest channel and rounded to ``BITS`` bits, with sign.
    """
    keys = keys.to(torch.float32)
    scale = keys.abs().amax(-1, keepdim=True).clamp(min=1e-12) / (2 ** (BITS - 1) - 1)
    levels = (keys / scale).round()
    step = 2**LATER_BITS
    return (levels / step).floor() * step * scale, levels * scale
