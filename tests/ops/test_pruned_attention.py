"""Attention that reads fewer values and bits, against plain attention."""

from __future__ import annotations

import pytest
import torch

from tokenthrift.ops.pruned_attention import attend_all, attend_top_values, of_heads, two_part_keys


def made(q=1, n=20, batch=2):
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, h, m, 8, generator=g) for h, m in ((6, q), (2, n), (2, n)))


def dense(q, k, v, mask=None):
    k, v = (t.repeat_interleave(3, 1) for t in (k, v))
    logits = q @ k.transpose(-1, -2)
    weights = (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).softmax(-1)
    return weights, v


@pytest.mark.parametrize("additive", [False, True])
def test_each_head_reads_the_values_of_its_most_probable_entries(additive):
    q, k, v = made()
    real = torch.arange(20) >= torch.tensor([[8], [0]])
    weights, values = dense(q, k, v, real[:, None, None])
    want = torch.zeros(2, 6, 1, 8)
    for row, count in enumerate((4, 7)):  # a third of 12 and of 20
        for head in range(6):
            best = weights[row, head, 0].topk(count).indices
            want[row, head, 0] = weights[row, head, 0, best] @ values[row, head, best]
    mask = real[:, None, None]
    mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    out, unsure = attend_top_values(q, k, v, 1.0, mask, share=1 / 3)
    torch.testing.assert_close(out, want)
    assert not unsure.any()
    whole, _ = attend_top_values(q, k, v, 1.0, mask)
    torch.testing.assert_close(whole, weights @ values)


def test_the_lower_bits_count_where_no_probability_is_high():
    q, k, v = made()
    first, whole = two_part_keys(k)
    weights, values = dense(q, first, v)
    unsure = weights.amax(-1)[..., 0] < 0.4
    assert unsure.any() and not unsure.all()
    want = torch.where(unsure[..., None, None], dense(q, whole, v)[0], weights) @ values
    out, got = attend_top_values(q, k, v, 1.0, threshold=0.4)
    torch.testing.assert_close(out, want)
    assert got.equal(unsure)


def test_keys_in_two_parts_have_so_many_levels():
    k = made(n=200)[1]
    first, whole = two_part_keys(k)
    scale = k.abs().amax(-1, keepdim=True) / 2047
    assert ((whole - k).abs() <= scale * 0.501).all()
    assert ((whole - first) > -1e-6).all() and ((whole - first) < scale * 15.01).all()
    assert len((first / scale).round().unique()) <= 2**8 and len((whole / scale).round().unique()) > 2**8
    assert torch.equal(two_part_keys(torch.zeros(1, 1, 2, 4))[0], torch.zeros(1, 1, 2, 4))


def test_some_heads_attend_as_they_do_among_all():
    q, k, v = made(q=5, n=5)
    heads = torch.tensor([[0, 4], [2, 3]])
    mask = torch.ones(2, 6, 5, 5).tril().bool()
    mask[1, 2, 3, 1] = False
    weights, values = dense(q, k, v, mask)
    want = (weights @ values)[torch.arange(2)[:, None], heads]
    *some, theirs = of_heads(q, k, v, heads, mask)
    torch.testing.assert_close(attend_all(*some, 1.0, theirs), want)
    causal = torch.ones(5, 5).tril().bool()
    *some, theirs = of_heads(q, k, v, heads)
    weights, values = dense(q, k, v, causal)
    torch.testing.assert_close(attend_all(*some, 1.0, theirs), (weights @ values)[torch.arange(2)[:, None], heads])
