"""Pooling in place of attention: global, by segment and local, linear in the length (PoNet, arXiv 2110.02442)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d


def multi_granularity_pool(
    queries: Tensor,
    keys: Tensor,
    outputs: Tensor,
    local: Tensor,
    segment: Tensor,
    segments: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """PoNet's mixing of six projections of the hidden states: ``(G + S) * outputs + L``.

    ``G``: the mean query attends to the keys, whose mix it takes (one vector a head for the whole row). ``S``: the
    maximum of ``segment`` over the token's segment. ``L``: the maximum of ``local`` over the token and its two
    neighbours. Unlike the authors' code it leaves its inputs as they are.

    Args:
        queries, keys, outputs: ``(batch, heads, n, head_dim)``.
        local, segment: ``(batch, n, heads * head_dim)``.
        segments: ``(batch, n)`` int64, the segment of each token (sentences, or :func:`equal_segments`).
        mask: ``(batch, n)`` bool, true for real tokens; padding takes no part and gets zeros.

    Returns:
        ``(batch, n, heads * head_dim)``.
    """
    batch, heads, n, dim = queries.shape
    real = torch.ones(batch, n, dtype=torch.bool, device=queries.device) if mask is None else mask.bool()
    weight = real[:, None, :, None].to(queries.dtype)
    mean = (queries * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)
    # A finite low, so that rows and segments of nothing but padding have no NaN.
    low = torch.finfo(queries.dtype).min
    scores = (mean @ keys.transpose(-1, -2) * dim**-0.5).masked_fill(~real[:, None, None], low)
    whole = torch.softmax(scores, dim=-1) @ keys

    segment, local = (x.masked_fill(~real.unsqueeze(-1), low) for x in (segment, local))
    index = segments.unsqueeze(-1).expand_as(segment)
    top = segment.new_full((batch, int(segments.max()) + 1, segment.shape[-1]), low)
    of_segment = top.scatter_reduce(1, index, segment, "amax").gather(1, index)
    of_segment = of_segment.view(batch, n, heads, dim).transpose(1, 2)
    near = max_pool1d(local.transpose(1, 2), kernel_size=3, stride=1, padding=1).transpose(1, 2)

    mixed = ((whole + of_segment) * outputs).transpose(1, 2).reshape(batch, n, heads * dim)
    return torch.where(real.unsqueeze(-1), mixed + near, 0)


def equal_segments(batch: int, n: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Segments of ``n // count + 1`` tokens each (the last may be shorter): ``(batch, n)`` int64, as in PoNet's LRA."""
    return (torch.arange(n, device=device) // (n // count + 1)).expand(batch, n)
