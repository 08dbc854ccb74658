"""Learned rates: numbers worked out by hand, and gradients that point the right way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenthrift.ops.rates import (
    LayerCost,
    candidates,
    encoder_flops,
    kept_number,
    masked_softmax,
    prune_and_merge,
    rank_tokens,
    ste,
    ste_min,
    survival,
    survival_mask,
)

VIT = LayerCost(attention=4 * 8**2, pair=2 * 8, mlp=8 * 8**2)  # width 8, multiply-adds


def first(tokens, prefix, batch=2):
    return (torch.arange(tokens) < prefix).expand(batch, -1)


def scalar(x):
    return torch.tensor(float(x), requires_grad=True)


def test_ranks_put_the_prefix_first_and_ties_in_order():
    rank = rank_tokens(torch.tensor([[0.0, 5.0, 1.0, 3.0, 3.0]]), first(5, 1, batch=1))
    assert rank.tolist() == [[0, 1, 4, 2, 3]]
    assert rank_tokens(torch.tensor([[0.0, 0.0, 9.0]]), first(3, 2, batch=1)).tolist() == [[0, 1, 2]]


def test_pruning_and_merging_by_hand():
    x = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [1.0, 0.0], [1.0, 0.0]]])
    rank = rank_tokens(torch.tensor([[0.0, 4.0, 5.0, 3.0, 1.0, 2.0]]), first(6, 1, batch=1))
    joins, similarity = prune_and_merge(x, rank, 5, 3, first(6, 1, batch=1))
    assert joins.tolist() == [[0, 1, 2, 2, -1, 1]]
    torch.testing.assert_close(similarity, torch.tensor([[1.0, 1.0, 1.0, 0.8, 1.0, 1.0]]))
    joins, _ = prune_and_merge(x, rank, 3, 3, first(6, 1, batch=1))
    assert joins.tolist() == [[0, 1, 2, -1, -1, -1]]


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(3, 12), prefix=st.integers(0, 2), data=st.data(), seed=st.integers(0, 999))
def test_laws_of_pruning_and_merging(tokens, prefix, data, seed):
    torch.manual_seed(seed)
    prune = data.draw(st.integers(prefix + 1, tokens))
    merge = data.draw(st.integers(prefix + 1, prune))
    protected = first(tokens, prefix).clone()
    protected[1, tokens - 1] = merge > prefix + 1  # the last token of a text, say
    rank = rank_tokens(torch.rand(2, tokens), protected)
    joins, similarity = prune_and_merge(torch.randn(2, tokens, 4), rank, prune, merge, protected)
    stay = joins == torch.arange(tokens)
    assert (stay == (rank < merge)).all() and ((joins < 0) == (rank >= prune)).all()
    assert stay.gather(1, joins.clamp(min=0))[joins >= 0].all()  # nothing joins what does not stay
    gone = ~stay & (joins >= 0)
    assert not protected.gather(1, joins.clamp(min=0))[gone].any() and stay[protected].all()
    assert (similarity[~gone] == 1).all() and similarity.isfinite().all()


def test_candidates_and_their_mean():
    assert candidates(5).tolist() == [5, 4, 3, 2, 1]
    assert candidates(5, granularity=2).tolist() == [5, 3, 1]
    assert candidates(4, granularity=9).tolist() == [4]  # a layer that never compresses
    assert kept_number(torch.zeros(5), candidates(5), prefix=1) == 4  # the mean 3, and the class token
    assert kept_number(torch.zeros(4), candidates(4), prefix=1) == 4  # 2.5 rounded up
    sure = torch.full((5,), -99.0).index_fill(0, torch.tensor([1]), 99.0)
    assert kept_number(sure, candidates(5), prefix=2) == 6


@pytest.mark.parametrize("patches", [1, 3, 27, 195, 255])
def test_a_mean_that_is_whole_is_not_rounded_up(patches):
    assert kept_number(torch.zeros(patches), candidates(patches), prefix=0) == (patches + 1) // 2


def test_the_kept_number_has_the_gradient_of_the_mean():
    theta = torch.zeros(4, requires_grad=True)
    kept_number(theta, candidates(4), prefix=1).backward()
    torch.testing.assert_close(theta.grad, (torch.tensor([4.0, 3, 2, 1]) - 2.5) / 4)  # p (k - mean)


def test_survival_by_hand():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])  # of keeping 4, 3, 2, 1 patches
    out = survival(p.log(), candidates(4), prefix=1, tokens=5)
    torch.testing.assert_close(out, torch.tensor([1.0, 1.0, 0.6, 0.3, 0.1]))
    assert survival(torch.zeros(2), candidates(4, 2), 0, 4).tolist() == [1, 1, 0.5, 0.5]  # 4 or 2


def test_the_mask_is_hard_forward_and_soft_backward():
    theta = torch.zeros(4, requires_grad=True)
    mask = survival_mask(survival(theta, candidates(4), 1, 5), kept=3, before=4)
    assert mask.tolist() == [1, 1, 1, 0, 1]  # what went before stays to the masks of before
    mask[3].backward()  # this token is wanted: the candidates that keep it gain
    assert (theta.grad[:2] > 0).all() and (theta.grad[2:] < 0).all()
    torch.testing.assert_close(theta.grad, torch.tensor([0.125, 0.125, -0.125, -0.125]))


def test_straight_through_and_the_least():
    x = scalar(2.3)
    y = ste(torch.tensor(3.0), x)
    y.backward()
    assert y == 3 and x.grad == 1
    before, prune, merge = scalar(10), scalar(8), scalar(9)
    least = ste_min(before, prune, merge)
    (5 * least).backward()
    assert least == 8 and prune.grad == merge.grad == 5 and before.grad is None
    assert ste_min(scalar(4), scalar(8), scalar(9)) == 4


def test_flops_by_hand_and_more_tokens_cost_more():
    kept = [(scalar(6), scalar(5)), (scalar(9), scalar(4))]
    total = encoder_flops(10, kept, [VIT, VIT])
    c = 8
    assert total == sum((4 * 10 * c * c + 2 * 10 * 10 * c, 8 * 5 * c * c, 4 * 5 * c * c + 2 * 25 * c, 8 * 4 * c * c))
    total.backward()
    assert all(n.grad > 0 for pair in kept for n in pair)
    assert kept[0][1].grad == 8 * c * c + 4 * c * c + 2 * 2 * 5 * c  # its MLP, and the next layer's attention
    assert kept[1][1].grad == 8 * c * c


def test_masked_softmax():
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(masked_softmax(scores, torch.ones(2, 5)), scores.softmax(-1), rtol=1e-5, atol=1e-6)
    mask = torch.tensor([[1.0, 1, 0, 1, 0], [1, 1, 1, 1, 1]], requires_grad=True)
    out = masked_softmax(scores, mask)
    torch.testing.assert_close(out.sum(-1), torch.ones(2, 3, 5))
    kept = torch.tensor([0, 1, 3])
    expected = scores[0][:, kept][:, :, kept].softmax(-1)
    torch.testing.assert_close(out[0][:, kept][:, :, kept], expected, rtol=1e-4, atol=1e-5)
    assert out[0, :, 0, 2].max() < 1e-5 < out[0, :, 2, 2].min()  # gone for others, not for itself
    out[0, :, 0, 4].sum().backward()
    assert mask.grad[0, 4] > 0 and mask.grad.isfinite().all()
    assert masked_softmax(torch.full((1, 1, 2, 2), -1e30), torch.zeros(1, 2)).isfinite().all()


def test_descent_on_the_flops_meets_a_target_from_both_sides():
    for target in (0.4, 0.8):
        numbers, dense = candidates(16), 2 * (16 * 768 + 16 * 16 * 16)
        theta = [[torch.zeros(16, requires_grad=True) for _ in "pm"] for _ in range(2)]
        flat = [t for pair in theta for t in pair]
        optimiser = torch.optim.AdamW(flat, lr=0.05, weight_decay=0)
        for _ in range(150):
            kept = [tuple(kept_number(t, numbers, 0) for t in pair) for pair in theta]
            share = encoder_flops(16, kept, [VIT, VIT]) / dense
            optimiser.zero_grad()
            ((share - target) ** 2).backward()
            assert all(t.grad.isfinite().all() for t in flat)
            optimiser.step()
        assert abs(float(share.detach()) - target) < 0.06
