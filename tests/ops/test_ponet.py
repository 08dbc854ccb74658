"""PoNet's pooling against the authors' numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tokenthrift.ops.ponet import equal_segments, multi_granularity_pool

GOLDEN = Path(__file__).parents[1] / "golden" / "vision" / "ponet.npz"
close = {"rtol": 1e-5, "atol": 1e-6}


def golden():
    g = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN).items()}
    return g, [g[k] for k in ("Q", "K", "O", "local", "segment", "segment_index")]


@pytest.mark.parametrize("masked", [True, False])
def test_equals_the_official_pooling(masked):
    g, parts = golden()
    before = [p.clone() for p in parts]
    out = multi_granularity_pool(*parts, mask=g["mask"] if masked else None)
    torch.testing.assert_close(out, g["out_masked" if masked else "out_nomask"], **close)
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))


def test_segments_are_the_official_ones():
    g, _ = golden()
    assert torch.equal(equal_segments(2, 11, int(g["segment_num"])), g["segment_index"])


def test_padding_has_no_influence():
    g, (q, k, o, local, segment, index) = golden()
    n = 8
    heads, rows = [x[1:, :, :n] for x in (q, k, o)], [x[1:, :n] for x in (local, segment, index)]
    alone = multi_granularity_pool(*heads, *rows)
    both = multi_granularity_pool(q, k, o, local, segment, index, g["mask"])
    torch.testing.assert_close(both[1:, :n], alone, **close)
    assert (both[1, n:] == 0).all()


def test_a_row_of_padding_is_zero():
    _, parts = golden()
    out = multi_granularity_pool(*parts, mask=torch.zeros(2, 11, dtype=torch.bool))
    assert (out == 0).all()
