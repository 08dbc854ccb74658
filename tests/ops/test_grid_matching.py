"""Matching with given destinations: the authors' numbers (tomesd), and the laws of merging."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenthrift.ops.grid_matching import draw_cells, match_to, one_per_cell

GOLDEN = Path(__file__).parents[1] / "golden" / "vision"
close = {"rtol": 1e-5, "atol": 1e-6}


def golden(name):
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}.npz").items()}


def as_set(rows):
    """Rows of ``(batch, rows, dim)`` in a canonical order: the official one comes from an unstable sort."""
    order = rows[..., 0].argsort(-1).unsqueeze(-1)
    return rows.gather(1, order.expand_as(rows))


@pytest.mark.parametrize("case", ["norand", "rand", "odd", "max"])
def test_equals_the_official_random_2d_merge(case):
    g = {k.removeprefix(f"{case}_"): v for k, v in golden("tomesd_random2d").items() if k.startswith(f"{case}_")}
    h, w, sx, sy, r = g["hw_sxsy_r"].tolist()
    receives = one_per_cell(g["draw"].squeeze(-1), h, w, (sy, sx))
    map = match_to(g["metric"], receives, r).map()
    merged = map.apply(g["x"])
    torch.testing.assert_close(as_set(merged), as_set(g["merged"]), **close)
    torch.testing.assert_close(map.unmerge(merged), g["unmerged"], **close)


def test_equals_the_official_matrices():
    g = golden("matrix_form")
    receives = one_per_cell(draw_cells(1, 4, 4, (2, 2), None), 4, 4, (2, 2)).flatten()
    map = match_to(g["metric"][:, 1:], receives, 8).map()
    # the order of outputs is ours: W and U are compared in the order of the outputs' first sources
    first = lambda m: m.gt(0).to(torch.uint8).argmax(-1).argsort(-1)[0]  # noqa: E731
    w, u = map.dense(), map.unmerge(torch.eye(8).unsqueeze(0))
    ours, theirs = first(w), first(g["tomesd_W"])
    torch.testing.assert_close(w[:, ours], g["tomesd_W"][:, theirs], **close)
    torch.testing.assert_close(u[:, :, ours], g["tomesd_U"][:, :, theirs], **close)
    torch.testing.assert_close(map.apply(g["x"][:, 1:])[:, ours], g["tomesd_out"][:, theirs], **close)


def test_the_draws_are_the_official_ones():
    assert torch.equal(draw_cells(1, 8, 8, (2, 2), 33)[0], golden("tomesd_random2d")["rand_draw"][..., 0])
    assert torch.equal(draw_cells(2, 4, 6, (2, 2), 33), golden("fastvggt_merge")["noprot_draw"])


def test_drawing_leaves_the_users_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draw_cells(2, 6, 6, (2, 2), 0)
    assert torch.equal(torch.rand(3), expected)


@given(h=st.integers(0, 7), w=st.integers(1, 7), sy=st.integers(1, 3), sx=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_one_patch_of_every_full_cell_is_picked(h, w, sy, sx, seed):
    grid = one_per_cell(draw_cells(2, h, w, (sy, sx), seed), h, w, (sy, sx)).view(2, h, w)
    assert grid.sum() == 2 * (h // sy) * (w // sx)
    for row in range(h // sy):
        for column in range(w // sx):
            cell = grid[:, row * sy : (row + 1) * sy, column * sx : (column + 1) * sx]
            assert (cell.sum((1, 2)) == 1).all()


@given(
    tokens=st.integers(1, 20), r=st.integers(0, 20), chunk=st.integers(1, 7), share=st.floats(0, 1), seed=st.integers(0)
)
def test_laws_of_merging(tokens, r, chunk, share, seed):
    g = torch.Generator().manual_seed(seed % 2**31)
    metric, x = torch.randn(2, tokens, 4, generator=g), torch.randn(2, tokens, 3, generator=g)
    receives = torch.rand(tokens, generator=g) < share
    protected = torch.rand(tokens, generator=g) < 0.3
    groups = match_to(metric, receives, r, protected, chunk)
    givers = int((~receives & ~protected).sum())
    if groups is None:
        assert r == 0 or givers == 0 or not receives.any()
        return
    assert torch.equal(groups.group, match_to(metric, receives, r, protected).group)  # whatever the chunk
    map = groups.map()
    eye = torch.eye(map.n_out).expand(2, -1, -1)
    assert map.n_out == tokens - min(r, givers)
    torch.testing.assert_close(map.dense() @ map.unmerge(eye), eye, **close)
    torch.testing.assert_close(map.sizes().sum(-1), torch.full((2,), float(tokens)), **close)
    assert (map.anchors.diff(dim=-1) > 0).all()
    back = map.unmerge(map.apply(x))
    alone = map.sizes().gather(1, map.owner) == 1
    assert torch.equal(back[alone], x[alone])  # tokens that did not merge come back bit-exact
    assert alone[:, protected & ~receives].all()
