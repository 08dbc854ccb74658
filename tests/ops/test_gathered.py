"""Attention over selected entries: every path equals the definition, and dense attention with a mask."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tokenthrift.ops.gathered import (
    gather_rows,
    gather_rows_attention,
    gathered_attention,
    gathered_attention_reference,
)


def inputs(per, layout="contiguous", dtype=torch.float32, device="cpu", queries=1, dim=16, n=50, k=12, seed=0):
    """Two rows, six query heads, two key/value heads."""
    made = torch.Generator().manual_seed(seed)
    batch, heads, kv_heads = 2, 6, 2
    query = torch.randn(batch, heads, queries, dim, generator=made)
    if layout == "buffer":  # the front of a longer buffer, as caches with room are
        keys, values = (torch.randn(batch, kv_heads, n + 30, dim, generator=made)[:, :, 3 : n + 3] for _ in range(2))
    elif layout == "tokens first":
        keys, values = (torch.randn(batch, n, kv_heads, dim, generator=made).transpose(1, 2) for _ in range(2))
    elif layout == "channels apart":
        keys, values = (torch.randn(batch, kv_heads, dim, n, generator=made).mT for _ in range(2))
    else:
        keys, values = (torch.randn(batch, kv_heads, n, dim, generator=made) for _ in range(2))
    chosen = {"group": kv_heads, "query": heads}[per]
    indices = torch.rand(batch, chosen, n, generator=made).topk(k).indices
    parts = [t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in (query, keys, values)]
    return *parts, indices.to(device)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("per", ["group", "query"])
@pytest.mark.parametrize("layout", ["contiguous", "buffer", "tokens first", "channels apart"])
@pytest.mark.parametrize("masked", [False, True])
def test_paths_agree_with_masked_dense_attention(per, layout, masked, queries):
    query, keys, values, indices = inputs(per, layout, queries=queries)
    mask = None
    seen = torch.zeros(2, indices.shape[1], 50, dtype=torch.bool).scatter_(-1, indices, True)
    if masked:
        mask = torch.rand(indices.shape, generator=torch.Generator().manual_seed(5)) < 0.5
        mask[..., 0] = True
        seen = torch.zeros_like(seen).scatter_(-1, indices, mask)
    bias = seen.repeat_interleave(6 // seen.shape[1], 1).unsqueeze(2)
    want = scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=0.3, enable_gqa=True)
    for path in (gathered_attention_reference, gather_rows_attention, gathered_attention):
        torch.testing.assert_close(path(query, keys, values, indices, 0.3, mask), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    query, keys, values, indices = inputs("group", dtype=dtype)
    want = gathered_attention_reference(query, keys, values, indices, 0.3)
    got = gathered_attention(query, keys, values, indices, 0.3)
    assert got.dtype == want.dtype == dtype
    torch.testing.assert_close(got, want, atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-2)


def test_values_may_be_narrower_than_keys():
    query, keys, values, indices = inputs("query")
    want = gathered_attention_reference(query, keys, values[..., :8].contiguous(), indices, 0.3)
    assert want.shape == (2, 6, 1, 8)
    torch.testing.assert_close(gathered_attention(query, keys, values[..., :8].contiguous(), indices, 0.3), want)
    torch.testing.assert_close(gathered_attention(query, keys, values[..., :8], indices, 0.3), want)


def test_rows_are_those_of_gather_whatever_the_layout():
    for layout in ("contiguous", "buffer", "tokens first", "channels apart"):
        _, keys, _, indices = inputs("group", layout)
        assert torch.equal(gather_rows(keys, indices), keys.gather(2, indices.unsqueeze(-1).expand(-1, -1, -1, 16)))


def test_what_inference_mode_cached_serves_training():
    query, keys, values, indices = inputs("group", n=51)
    with torch.inference_mode():
        gathered_attention(query, keys, values, indices, 0.3)
    query.requires_grad_()
    gathered_attention(query, keys, values, indices, 0.3).sum().backward()
    assert query.grad is not None


KERNEL_ON = "cuda" if torch.cuda.is_available() else "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else None
"""Triton's interpreter runs the kernel on a CPU, slowly."""


@pytest.mark.skipif(KERNEL_ON is None, reason="the kernel needs a GPU, or TRITON_INTERPRET=1")
@pytest.mark.parametrize("per", ["group", "query"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("dim", "k"), [(64, 1), (64, 300), (128, 1111), (80, 64)])
def test_the_gpu_kernel_agrees(per, masked, dtype, dim, k):
    from tokenthrift.ops.gathered_triton import gathered_attention_triton, takes

    if KERNEL_ON == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter cannot multiply bfloat16")
    query, keys, values, indices = inputs(per, "buffer", dtype, KERNEL_ON, dim=dim, n=1500, k=k)
    assert takes(query, keys, values)
    mask = None
    if masked:
        mask = torch.rand(indices.shape, device=KERNEL_ON) < 0.5
        mask[..., 0] = True
    want = gathered_attention_reference(query, keys, values, indices, 0.2, mask)
    got = gathered_attention_triton(query, keys, values, indices, 0.2, mask)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
