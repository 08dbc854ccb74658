"""Attention rows equal the rows of full attention; top-k keeps real tokens only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from tokenthrift.core.budget import Budget
from tokenthrift.ops.attention import attention_received, attention_rows, augment_keys, group_mean, window_scores
from tokenthrift.ops.rows import score_rows
from tokenthrift.ops.topk import keep_top


def full_attention(q, k, scaling, mask):
    n = k.shape[2]
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scaling
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)[None, None] | ~mask[:, None, None]
    return logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()


def test_rows_equal_full_attention_with_groups_and_padding():
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 20, 8), torch.randn(2, 2, 20, 8)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, :17] = False  # only three real tokens: two of the five rows asked for are padding
    want = full_attention(q, k, 0.3, mask)[:, :, -5:] * mask[:, None, -5:, None]
    torch.testing.assert_close(attention_rows(q[:, :, -5:], k, 0.3, mask), want)
    torch.testing.assert_close(attention_rows(q[:, :, -5:], k, 0.3)[1], want[1])


def test_rows_are_float32_also_for_half_precision():
    q, k = torch.randn(1, 2, 4, 8).bfloat16(), torch.randn(1, 2, 9, 8).bfloat16()
    rows = attention_rows(q, k, 1.0)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.sum(-1), torch.ones(1, 2, 4))


def test_group_mean_groups_consecutive_heads():
    x = torch.arange(6.0).view(1, 6, 1)
    torch.testing.assert_close(group_mean(x, 2), torch.tensor([[[1.0], [4.0]]]))


def test_keep_top_drops_padding_and_keeps_order():
    scores = torch.tensor([[[5.0, 1, 9, 3]], [[9.0, 9, 1, 2]]])
    mask = torch.tensor([[True] * 4, [False, False, True, True]])
    map = keep_top(scores, Budget.of(3), mask)
    assert map.source[0, 0].tolist() == [0, 2, 3]
    assert map.mask[1, 0].tolist() == [True, True, False]
    assert map.source[1, 0, :2].tolist() == [2, 3]


def test_keep_top_ratio_counts_real_tokens():
    mask = torch.tensor([[True] * 8, [False] * 4 + [True] * 4])
    assert keep_top(torch.rand(2, 3, 8), Budget.of(0.5), mask).mask.sum(-1).tolist() == [[4] * 3, [2] * 3]


def test_keep_top_with_nothing_to_drop_is_the_identity():
    mask = torch.tensor([[True] * 4, [False, False, True, True]])
    assert keep_top(torch.rand(2, 1, 4), Budget.of(4), mask).is_identity


def test_keep_top_takes_a_count_for_each_row():
    mask = torch.tensor([[True] * 5, [False, False, True, True, True]])
    map = keep_top(torch.arange(10.0).view(2, 1, 5), torch.tensor([2, 9]), mask)
    assert map.source[0, 0, :2].tolist() == [3, 4] and map.source[1, 0].tolist() == [2, 3, 4]
    assert map.mask.sum(-1).tolist() == [[2], [3]]


@pytest.mark.parametrize("block", [1, 7, 64])
def test_attention_received_equals_the_column_sums(block):
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 20, 8), torch.randn(2, 2, 20, 8)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, :9] = False
    want = (full_attention(q, k, 0.3, mask) * mask[:, None, :, None]).sum(2)
    torch.testing.assert_close(attention_received(q, k, 0.3, mask, block), want)
    torch.testing.assert_close(attention_received(q, k, 0.3, block=block)[1], want[1])


def test_attention_received_never_holds_more_than_a_block_of_rows():
    rows = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            rows.extend([out.numel()] if isinstance(out, torch.Tensor) else [])
            return out

    with Watch():
        attention_received(torch.randn(1, 2, 400, 8), torch.randn(1, 1, 400, 8), 1.0, block=16)
    assert max(rows) <= 2 * 400 * 16


def test_window_scores_put_the_window_above_pooled_votes():
    rows = torch.zeros(1, 2, 2, 7)
    rows[:, 0, :, 2] = 1  # one of the two heads that share a key head
    scores = window_scores(rows, 1, 3)
    torch.testing.assert_close(scores, torch.tensor([[[0, 1 / 6, 1 / 6, 1 / 6, 0, 2, 3]]]))


def test_rows_are_scored_without_their_padding():
    mask = torch.tensor([[True] * 4, [False, True, False, True]])
    x = torch.arange(8.0).view(2, 1, 4, 1)
    scores = score_rows(lambda t: t.squeeze(-1).cumsum(-1), mask, x)
    assert scores.tolist() == [[[0, 1, 3, 6]], [[-torch.inf, 5, -torch.inf, 12]]]


GOLDEN = Path(__file__).parents[1] / "golden" / "vision" / "tome_bsm.npz"


@pytest.mark.parametrize("multiple", [1, 8])
def test_augmented_keys_give_the_official_proportional_attention(multiple):
    g = {k.removeprefix("prop_"): torch.from_numpy(v) for k, v in np.load(GOLDEN).items() if k.startswith("prop_")}
    scaling = g["q"].shape[-1] ** -0.5
    q, k = augment_keys(g["q"], g["k"], g["size"].squeeze(-1), scaling, multiple)
    assert q.shape[-1] == k.shape[-1] == (5 if multiple == 1 else 8)
    out = scaled_dot_product_attention(q, k, g["v"], scale=scaling)
    torch.testing.assert_close(out, g["out"], rtol=1e-6, atol=1e-6)
    masked = scaled_dot_product_attention(g["q"], g["k"], g["v"], g["size"].log()[:, None].transpose(-1, -2))
    torch.testing.assert_close(out, masked, rtol=1e-6, atol=1e-6)


def test_augmented_keys_of_grouped_heads_hide_what_has_no_size():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 4)
    sizes = torch.tensor([[1.0, 2, 3, 1, 0], [4, 1, 1, 1, 2]])
    wide_q, wide_k = augment_keys(q, k, sizes, 0.3)
    out = scaled_dot_product_attention(wide_q, wide_k, v, scale=0.3, enable_gqa=True)
    bias = sizes.log()[:, None, None]
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, bias, scale=0.3, enable_gqa=True))
    without = scaled_dot_product_attention(
        q[:1], k[:1, :, :4], v[:1, :, :4], bias[:1, ..., :4], scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(out[:1], without)


def test_attention_received_from_the_last_queries_alone():
    """What all give is what the first give and what the last give."""
    q, k = torch.randn(2, 4, 21, 8), torch.randn(2, 2, 21, 8)
    first = attention_received(q[:, :, :14], k[:, :, :14], 0.3)
    last = attention_received(q[:, :, 14:], k, 0.3, block=3)
    torch.testing.assert_close(last + torch.nn.functional.pad(first, (0, 7)), attention_received(q, k, 0.3))
