"""Segments of neighbouring tokens, and pooling over them."""

import pytest
import torch

from tokenthrift.core.tokenmap import TokenMap
from tokenthrift.ops.segments import segment_pool, segment_starts

GROUPS = torch.tensor([[0, 1, 1, 1, 2, 0], [5, 5, 3, 3, 3, 3]])


def test_a_segment_begins_where_the_id_changes():
    assert segment_starts(GROUPS).tolist() == [
        [True, True, False, False, True, True],
        [True, False, True, False, False, False],
    ]


def test_tokens_that_stay_alone_end_the_segment_around_them():
    alone = torch.zeros_like(GROUPS, dtype=torch.bool)
    alone[:, 2] = True
    assert segment_starts(GROUPS, alone).tolist() == [
        [True, True, True, True, True, True],
        [True, False, True, True, False, False],
    ]


@pytest.mark.parametrize(
    ("mode", "of"), [("mean", torch.mean), ("sum", torch.sum), ("max", lambda x, dim: x.max(dim).values)]
)
def test_pools_each_segment(mode, of):
    x = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    out = segment_pool(x, GROUPS, mode)
    expected = [
        torch.stack([of(x[0, s], dim=0) for s in (slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 6))]),
        torch.stack([of(x[1, s], dim=0) for s in (slice(0, 2), slice(2, 6))]),
    ]
    torch.testing.assert_close(out[0], expected[0])
    torch.testing.assert_close(out[1, :2], expected[1])
    assert (out[1, 2:] == 0).all()


def test_the_mean_is_what_a_token_map_gives_and_passes_gradients():
    x = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    slot = segment_starts(GROUPS).cumsum(-1) - 1
    out = segment_pool(x, GROUPS)
    torch.testing.assert_close(out, TokenMap.merge(slot).apply(x))
    out.sum().backward()
    torch.testing.assert_close(x.grad.sum(1), torch.tensor([[4.0] * 3, [2.0] * 3]))


def test_half_precision_stays_and_no_tokens_are_none():
    assert segment_pool(torch.ones(2, 6, 3, dtype=torch.bfloat16), GROUPS).dtype == torch.bfloat16
    assert segment_pool(torch.ones(2, 0, 3), GROUPS[:, :0]).shape == (2, 0, 3)
