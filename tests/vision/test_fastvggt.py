"""FastVGGT's partition against the authors' numbers, and its laws. The model around it: tests/models/test_multiview."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tokenthrift import Plan, ThriftError, View
from tokenthrift.core.tokenmap import TokenMap
from tokenthrift.vision.fastvggt import FastVGGT, evenly, with_own_place

GOLDEN = Path(__file__).parents[1] / "golden" / "vision" / "fastvggt_merge.npz"


def golden():
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN).items()}


def view(x, grid=(3, 4, 6), prefix=5, layer=0):
    return View(features=x, prefix=prefix, grid=grid, layer=layer, layers=4)


def as_set(rows):
    return rows[:, rows[0, :, 0].argsort()]


@pytest.mark.parametrize(("case", "method"), [("noprot", FastVGGT(ratio=0.6, protect=0.0)), ("prot", FastVGGT())])
def test_equals_the_official_merge(case, method):
    g = golden()
    map = method.reduce(view(g["x"]))
    merged = map.apply(g["z"])
    torch.testing.assert_close(as_set(merged), as_set(g[f"{case}_merged"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(map.unmerge(merged), g[f"{case}_unmerged"], rtol=1e-5, atol=1e-6)


def test_rows_of_a_batch_are_independent():
    x = torch.randn(2, 87, 16, generator=torch.Generator().manual_seed(0))
    both = FastVGGT().reduce(view(x)).dense()
    for row in range(2):
        assert torch.equal(both[row : row + 1], FastVGGT().reduce(view(x[row : row + 1])).dense())


def test_the_first_view_and_protected_tokens_keep_what_is_theirs():
    x = torch.randn(1, 87, 16, generator=torch.Generator().manual_seed(0))
    map = FastVGGT().reduce(view(x))
    torch.testing.assert_close(map.dense().sum(-1), torch.ones(1, map.n_out))
    torch.testing.assert_close(map.sizes().sum(-1), torch.tensor([87.0]))
    own = evenly(87, 8)
    assert own.nonzero().flatten().tolist() == list(range(0, 80, 10))
    assert torch.equal(map.unmerge(map.apply(x))[:, own], x[:, own])
    assert map.owner[0, :29].unique().numel() == 29  # no two tokens of the reference view share an output


def test_one_prefix_for_all_frames_works_too():
    x = torch.randn(1, 1 + 2 * 16, 8, generator=torch.Generator().manual_seed(0))
    map = FastVGGT(protect=0.0).reduce(view(x, (2, 4, 4), 1))
    assert map.n_out == 1 + 16 + 4


@pytest.mark.parametrize(
    ("method", "grid", "layer"),
    [
        (FastVGGT(ratio=0.0), (3, 4, 6), 0),
        (FastVGGT(), (1, 4, 6), 0),
        (FastVGGT(start=2), (3, 4, 6), 1),
        (FastVGGT(sx=1, sy=1), (3, 4, 6), 0),
    ],
)
def test_nothing_to_merge_is_none(method, grid, layer):
    x = torch.randn(1, grid[0] * 29, 8)
    assert method.reduce(view(x, grid, layer=layer)) is None


def test_evenly_and_own_places_of_nobody():
    assert not evenly(9, 0).any()
    assert evenly(10, 9).sum() == 9
    map = TokenMap.identity(4)
    assert with_own_place(map, torch.tensor([], dtype=torch.int64)) is map


@pytest.mark.parametrize("bad", [{"ratio": 1.0}, {"protect": -0.1}, {"sx": 0}, {"start": -1}, {"seed": -2}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ThriftError, match="fastvggt"):
        FastVGGT(**bad)


def test_plans_print_back_the_same():
    plan = Plan.parse("vision=fastvggt(ratio=0.8, protect=0.0, start=2)")
    assert Plan.parse(str(plan)) == plan == Plan.from_yaml(plan.to_yaml())
