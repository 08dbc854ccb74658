"""Which tokens blocks keep, against the log-Gaussian shares written out."""

from __future__ import annotations

import math

import pytest
import torch

from tokenthrift.ops.core_tokens import block_order, block_shares, core_scores


def test_shares_are_a_gaussian_of_the_logarithm():
    weight = [math.exp(-((math.log2(k) - 1.3) ** 2) / (2 * 0.8**2)) for k in (1, 2, 4, 8)]
    want = torch.tensor(weight, dtype=torch.float64) / sum(weight)
    torch.testing.assert_close(block_shares(8, torch.tensor(1.3), 0.8), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("blocks", "size", "spread"), [(500, 8, 1.0), (37, 16, 0.5), (200, 2, 3.0)])
@pytest.mark.parametrize("mean", [-1.0, 0.4, 1.0, 2.7, 6.0])
def test_every_candidate_is_a_cut_of_one_order(blocks, size, spread, mean):
    """With any mean, the blocks' places and the shares say how many tokens each keeps: 1, 2, 4, …"""
    shares = block_shares(size, torch.tensor(mean), spread).tolist()
    keeps = []
    for place in range(blocks):
        most = max(e for e in range(len(shares)) if e == 0 or sum(shares[e:]) > (place + 0.5) / blocks)
        keeps.append(2**most)
    order = block_order(blocks, size, spread)
    assert (order < sum(keeps)).sum(-1).tolist() == keeps
    for e, share in enumerate(shares):
        assert abs(keeps.count(2**e) / blocks - share) <= 1 / blocks


def test_each_number_of_tokens_is_there_and_fewer_tokens_than_blocks_go_to_the_first():
    order = block_order(6, 4, 1.0)
    assert sorted(order.flatten().tolist()) == list(range(24))
    assert (order.diff(dim=-1) > 0).all()
    assert order[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_the_least_redundant_block_keeps_most_and_each_its_best():
    worth = torch.tensor([[3.0, 9, 1, 4], [7, 5, 8, 6]])
    scores = core_scores(worth, torch.tensor([0.2, 0.9]), 1.0)
    assert scores.flatten().sort().values.tolist() == list(range(-7, 1))
    kept = scores > -5
    assert kept[0].sum() == 4 - kept[1].sum() + 1 and kept[0].sum() > kept[1].sum()
    assert kept[1].tolist() == [False, False, True, False]
    other = core_scores(worth.flip(0), torch.tensor([0.9, 0.2]), 1.0)
    assert torch.equal(other, scores.flip(0))
