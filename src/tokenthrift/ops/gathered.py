"""Attention of few queries over selected entries of a long cache: what is not selected is not read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def gathered_attention(
    query: Tensor, keys: Tensor, values: Tensor, indices: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """Softmax attention over the entries at ``indices`` only.

    The query heads that share a key/value head are consecutive. On a GPU with Triton one kernel reads the selected
    entries where they lie; elsewhere they are gathered as whole rows first, which on a CPU costs less than a tenth of
    ``Tensor.gather``, and attended by ``scaled_dot_product_attention`` with the heads of a group as its queries.

    Args:
        query: ``(batch, heads, q, dim)``; all ``q`` queries of a head read the same entries.
        keys: ``(batch, kv_heads, n, dim)``; may be the front part of a longer buffer.
        values: ``(batch, kv_heads, n, value_dim)``.
        indices: ``(batch, kv_heads, k)`` int64, or ``(batch, heads, k)`` for a selection of each query head.
        scaling: factor on ``q·k``.
        mask: of the shape of ``indices`` (its heads may be 1), bool: false entries count for nothing. At least one in
            a row must be true.

    Returns:
        ``(batch, heads, q, value_dim)``.
    """
    if query.is_cuda and query.shape[-2] == 1 and not torch.is_grad_enabled():
        kernel = _kernel()
        if kernel is not None and kernel.takes(query, keys, values):
            out: Tensor = kernel.gathered_attention_triton(query, keys, values, indices, scaling, mask)
            return out
    return gather_rows_attention(query, keys, values, indices, scaling, mask)


def gathered_attention_reference(
    query: Tensor, keys: Tensor, values: Tensor, indices: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """The same by definition, in float32: every other path must agree with it."""
    heads, kv_heads = query.shape[1], keys.shape[1]
    indices = indices.repeat_interleave(heads // indices.shape[1], dim=1).unsqueeze(-1)
    chosen_keys, chosen_values = (
        t.repeat_interleave(heads // kv_heads, dim=1).gather(2, indices.expand(-1, -1, -1, t.shape[-1])).float()
        for t in (keys, values)
    )
    logits = query.float() @ chosen_keys.mT * scaling
    if mask is not None:
        mask = mask.repeat_interleave(heads // mask.shape[1], dim=1)
        logits = logits.masked_fill(~mask.unsqueeze(2), float("-inf"))
    return (logits.softmax(-1) @ chosen_values).to(query.dtype)


def gather_rows_attention(
    query: Tensor, keys: Tensor, values: Tensor, indices: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """The path for CPUs, and for GPUs without Triton."""
    batch, heads, count, dim = query.shape
    chosen = indices.shape[1]
    grouped = query.reshape(batch, chosen, heads // chosen * count, dim)
    bias = None if mask is None else mask.unsqueeze(2)
    chosen_keys, chosen_values = _gather((keys, values), indices)
    out = scaled_dot_product_attention(grouped, chosen_keys, chosen_values, attn_mask=bias, scale=scaling)
    return out.reshape(batch, heads, count, -1)


def gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    """``(batch, kv_heads, n, dim)`` at ``(batch, kv_heads or heads, k)``: ``(batch, kv_heads or heads, k, dim)``.

    Rows are copied whole from the memory that ``x`` is a view of, wherever its heads lie in it.
    """
    return _gather([x], indices)[0]


def _gather(sources: Sequence[Tensor], indices: Tensor) -> list[Tensor]:
    """The same of several: those that lie in memory alike, as keys and values do, need the rows' numbers but once."""
    batch, chosen, _ = indices.shape
    gathered, rows = [], indices
    of: tuple[int, int] | None = None  # in memory, rows from row to row of the batch and from head to head
    for x in sources:
        kv_heads, n, dim = x.shape[1:]
        first, second, row, column = x.stride()
        if column != 1 or row != dim or first % dim or second % dim:
            x = x.contiguous()
            first, second = x.stride()[:2]
        first, second = first // dim, second // dim
        if of != (first, second):
            rows = (indices + _starts(batch, kv_heads, chosen // kv_heads, first, second, indices.device)).flatten()
            of = first, second
        flat = x.as_strided(((batch - 1) * first + (kv_heads - 1) * second + n, dim), (dim, 1), x.storage_offset())
        gathered.append(flat.index_select(0, rows).view(batch, chosen, -1, dim))
    return gathered


@lru_cache(maxsize=16)
def span(start: int, end: int, device: torch.device) -> Tensor:
    """The entries from ``start`` to before ``end``: kept, since all layers of a step ask for the same ones."""
    with torch.inference_mode(False):  # kept, so it must be usable in every mode
        return torch.arange(start, end, device=device)


@cache
def _kernel() -> Any:
    """The module with the GPU kernel, imported when first needed; None without Triton."""
    try:
        from . import gathered_triton
    except ImportError:
        return None
    return gathered_triton


@lru_cache(maxsize=64)
def _starts(batch: int, kv_heads: int, shared: int, row: int, head: int, device: torch.device) -> Tensor:
    """``(batch, kv_heads * shared, 1)``: the first row of every (query) head in the flat memory."""
    with torch.inference_mode(False):  # kept, so it must be usable in every mode
        heads = torch.arange(kv_heads, device=device).repeat_interleave(shared) * head
        return (torch.arange(batch, device=device)[:, None] * row + heads).unsqueeze(-1)
