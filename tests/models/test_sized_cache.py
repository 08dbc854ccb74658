"""Entries that stand for several tokens: in attention they weigh as much as so many copies of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tokenthrift.core.tokenmap import TokenMap
from tokenthrift.models.cache_stage import reduced_mask
from tokenthrift.models.kv import ReducedLayer

GROUP = torch.tensor([[[0, 1, 1, 1, 2, 3], [0, 0, 1, 2, 2, -1]], [[0, 1, 2, 3, 3, 3], [0, 0, 0, 0, 1, 1]]])


def layer(proportional=True):
    g = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 2, 6, 8, generator=g) for _ in range(2))
    mask = torch.ones(2, 6, dtype=torch.bool)
    return ReducedLayer(keys, values, TokenMap.merge(GROUP, 4), mask, proportional=proportional)


def copies(stored):
    """Keys and values in which merged entries stand as often as they have tokens, per row and head."""
    for row in range(2):
        for head in range(2):
            sizes = torch.bincount(GROUP[row, head][GROUP[row, head] >= 0], minlength=4)
            sizes = sizes.roll(int((sizes == 0).sum()))  # where there are fewer entries, padding comes first
            new = torch.ones(stored.keys.shape[2] - 4, dtype=torch.long)
            index = torch.arange(len(sizes) + len(new)).repeat_interleave(torch.cat([sizes, new]))
            yield row, head, stored.keys[row, head, index], stored.values[row, head, index]


@pytest.mark.parametrize("new", [0, 1, 3])
@pytest.mark.parametrize("additive", [False, True])
def test_attention_is_that_over_copies(new, additive):
    stored, g = layer(), torch.Generator().manual_seed(1)
    more = torch.randn(2, 2, 2, new, 8, generator=g)
    stored.update(*more)
    query = torch.randn(2, 4, max(new, 1), 8, generator=g)
    mask = torch.zeros(2, 1, max(new, 1), 9) if additive else None
    if additive and new:
        mask.masked_fill_(~torch.ones(new, 9, dtype=torch.bool).tril(9 - new), torch.finfo(torch.float32).min)
    if not new:
        stored.update(*torch.full((2, 2, 2, 1, 8), 0.5))
    seen = reduced_mask(stored, query, mask)
    out = scaled_dot_product_attention(
        query, stored.keys.repeat_interleave(2, 1), stored.values.repeat_interleave(2, 1), attn_mask=seen
    )
    for row, head, keys, values in copies(stored):
        for shared in range(2):
            for i in range(max(new, 1)):
                end = len(keys) - max(new, 1) + i + 1
                want = scaled_dot_product_attention(query[row, 2 * head + shared, i : i + 1], keys[:end], values[:end])
                torch.testing.assert_close(out[row, 2 * head + shared, i : i + 1], want)


def test_the_bias_follows_the_entries():
    stored = layer()
    first = stored.bias.clone()
    assert first.exp().round().long()[0, 0].tolist() == [1, 3, 1, 1]
    stored.update(*torch.ones(2, 2, 2, 3, 8))
    assert stored.bias.shape == stored.keys.shape[:-1]
    assert not stored.bias[..., 4:].any()
    stored.crop(-2)
    assert stored.bias.shape[-1] == 5
    stored.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(stored.bias[0, :, :4], first[1])
    stored.take(torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 8), [2, 1])
    assert stored.bias.shape[-1] == 7 and not stored.bias[..., 4:].any()
    stored.reset()
    assert stored.bias is None


def test_sizes_count_only_where_a_method_asks_for_it():
    assert layer(proportional=False).bias is None
