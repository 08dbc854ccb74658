"""The GPU path of gathered attention: selected entries are read where they lie, by one Triton kernel.

Decoding has one query, so a program a head would leave most of a GPU idle: each head's entries are split over several
programs, which keep their softmax's maximum and sum, and a second kernel joins what they found.
"""

# mypy: ignore-errors
# What Triton compiles has no types, and Triton itself is not there on a CPU.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PROGRAMS = 256
"""Programs that keep a large GPU busy; heads are split until there are about so many."""
_TILE = 16384
"""Bytes of keys that a program reads at a time: with values, and both twice for overlap, shared memory holds them."""


def takes(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernel can read these."""
    return (
        query.dtype == keys.dtype == values.dtype
        and query.dtype in _DTYPES
        and keys.shape[-1] <= 256
        and values.shape[-1] <= 256
        and keys.stride(-1) == values.stride(-1) == 1
    )


def gathered_attention_triton(
    query: Tensor, keys: Tensor, values: Tensor, indices: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """See :func:`tokenthrift.ops.gathered.gathered_attention`; one query a head."""
    power = triton.next_power_of_2
    batch, heads, _, dim = query.shape
    kv_heads, width = keys.shape[1], values.shape[-1]
    chosen, k = indices.shape[1:]
    shared = heads // chosen  # query heads that read the same entries
    query, indices = query.reshape(batch, chosen, shared, dim).contiguous(), indices.contiguous()
    block = max(16, min(64, _TILE // (max(power(dim), power(width)) * keys.element_size())))
    splits = max(1, min(power(-(-k // block)), power(-(-_PROGRAMS // (batch * chosen))), 64))
    part = {"device": query.device, "dtype": torch.float32}
    top = torch.empty(batch * chosen, splits, shared, **part)
    total = torch.empty_like(top)
    sums = torch.empty(batch * chosen, splits, shared, width, **part)
    seen = indices if mask is None else mask.expand(indices.shape).contiguous().view(torch.uint8)
    wide = {"DIM": dim, "WIDTH": width, "BLOCK_DIM": max(16, power(dim)), "BLOCK_WIDTH": max(16, power(width))}
    with torch.cuda.device_of(query):
        _attend[(batch * chosen, splits)](
            query, keys, values, indices, seen, top, total, sums,
            keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2),
            scaling, k, -(-k // (splits * block)) * block,
            CHOSEN=chosen, PER_KV=chosen // kv_heads, SHARED=shared, MASKED=mask is not None,
            BLOCK_ROWS=max(16, power(shared)), BLOCK=block, num_stages=2, **wide,
        )  # fmt: skip
        out = torch.empty(batch, heads, 1, width, device=query.device, dtype=query.dtype)
        _join[(batch * chosen * shared,)](
            top, total, sums, out, SPLITS=splits, SHARED=shared, WIDTH=width, BLOCK_WIDTH=wide["BLOCK_WIDTH"]
        )
    return out


@triton.jit
def _attend(
    query, keys, values, indices, seen, top, total, sums,
    key_row, key_head, key_entry, value_row, value_head, value_entry,
    scaling, k, per_split,
    CHOSEN: tl.constexpr, PER_KV: tl.constexpr, SHARED: tl.constexpr, MASKED: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One share of one head's entries: the largest score, the sum of exponentials, the weighted sum of values."""
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row, kv_head = head // CHOSEN, head % CHOSEN // PER_KV
    rows = tl.arange(0, BLOCK_ROWS)
    channels = tl.arange(0, BLOCK_DIM)
    columns = tl.arange(0, BLOCK_WIDTH)
    asked = tl.load(
        query + (head * SHARED + rows[:, None]) * DIM + channels[None, :],
        mask=(rows[:, None] < SHARED) & (channels[None, :] < DIM),
        other=0.0,
    )
    keys += row * key_row + kv_head * key_head
    values += row * value_row + kv_head * value_head
    high = tl.full((BLOCK_ROWS,), -1e30, tl.float32)
    weight = tl.zeros((BLOCK_ROWS,), tl.float32)
    mixed = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    for start in range(split * per_split, min((split + 1) * per_split, k), BLOCK):
        place = start + tl.arange(0, BLOCK)
        real = place < k
        entry = tl.load(indices + head * k + place, mask=real, other=0).to(tl.int64)
        if MASKED:
            real = real & (tl.load(seen + head * k + place, mask=real, other=0) != 0)
        found = tl.load(
            keys + entry[None, :] * key_entry + channels[:, None],
            mask=real[None, :] & (channels[:, None] < DIM),
            other=0.0,
        )
        score = tl.dot(asked, found, input_precision="ieee").to(tl.float32) * scaling
        score = tl.where(real[None, :], score, -1e30)
        higher = tl.maximum(high, tl.max(score, axis=1))
        share = tl.where(real[None, :], tl.exp(score - higher[:, None]), 0.0)
        fade = tl.exp(high - higher)
        held = tl.load(
            values + entry[:, None] * value_entry + columns[None, :],
            mask=real[:, None] & (columns[None, :] < WIDTH),
            other=0.0,
        )
        weight = weight * fade + tl.sum(share, axis=1)
        mixed = mixed * fade[:, None] + tl.dot(share.to(held.dtype), held, input_precision="ieee").to(tl.float32)
        high = higher
    slot = (head * tl.num_programs(1) + split) * SHARED + rows
    tl.store(top + slot, high, mask=rows < SHARED)
    tl.store(total + slot, weight, mask=rows < SHARED)
    tl.store(
        sums + slot[:, None] * WIDTH + columns[None, :],
        mixed,
        mask=(rows[:, None] < SHARED) & (columns[None, :] < WIDTH),
    )


@triton.jit
def _join(
    top, total, sums, out,
    SPLITS: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """One query head: its shares, weighed by how far below the largest score they are."""
    head = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_WIDTH)
    slots = (head // SHARED * SPLITS + tl.arange(0, SPLITS)) * SHARED + head % SHARED
    high = tl.load(top + slots)
    fade = tl.exp(high - tl.max(high, axis=0))
    weight = tl.sum(tl.load(total + slots) * fade, axis=0)
    found = tl.load(sums + slots[:, None] * WIDTH + columns[None, :], mask=columns[None, :] < WIDTH, other=0.0)
    mixed = tl.sum(found * fade[:, None], axis=0) / weight
    tl.store(out + head * WIDTH + columns, mixed.to(out.dtype.element_ty), mask=columns < WIDTH)
