"""Super token attention: the layer against the authors' numbers, the method against the layer's operation."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tokenthrift import Plan, ThriftError, View
from tokenthrift.vision.super_tokens import SuperTokenAttention, SuperTokens

GOLDEN = Path(__file__).parents[1] / "golden" / "vision" / "svit_stoken.npz"
close = {"rtol": 1e-5, "atol": 1e-5}


def golden():
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN).items()}


@pytest.mark.parametrize("iterations", [1, 2])
def test_equals_the_official_sampling(iterations):
    g = golden()
    layer = SuperTokenAttention(8, (2, 3), iterations, refine=False)
    torch.testing.assert_close(layer(g["x"]), g[f"out_iter{iterations}"], **close)


def test_equals_the_official_layer_with_its_weights():
    g = golden()
    layer = SuperTokenAttention(8, (4, 4), heads=2, qkv_bias=True)
    name = "refine_param_"
    layer.load_state_dict({k.removeprefix(name): v for k, v in g.items() if k.startswith(name)})
    torch.testing.assert_close(layer(g["x"]), g["refine_out"], **close)


def test_cells_of_one_pixel_are_plain_attention():
    torch.manual_seed(0)
    layer, x = SuperTokenAttention(8, (1, 1), heads=2), torch.randn(1, 8, 3, 4)
    assert torch.equal(layer(x), layer.stoken_refine(x))


def view(grid=(1, 5, 6), prefix=1, seed=0, per_frame=False):
    t, h, w = grid
    tokens = t * (prefix + h * w) if per_frame else prefix + t * h * w
    features = torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(seed))
    return View(features=features, prefix=prefix, grid=grid, layer=0, layers=2)


@pytest.mark.parametrize(("grid", "prefix"), [((1, 5, 6), 1), ((2, 4, 4), 3), ((1, 7, 3), 0)])
def test_the_map_keeps_the_prefix_and_averages_neighbours(grid, prefix):
    v = view(grid, prefix)
    map = SuperTokens().reduce(v)
    assert map.n_out == prefix + grid[0] * -(-grid[1] // 2) * -(-grid[2] // 2)
    torch.testing.assert_close(map.dense().sum(-1), torch.ones(2, map.n_out), **close)
    assert torch.equal(map.apply(v.features)[:, :prefix], v.features[:, :prefix])
    ones = torch.ones(2, map.n_out, 1)
    torch.testing.assert_close(map.unmerge(ones), torch.ones(2, map.n_in, 1), **close)


def test_like_patches_share_super_tokens_and_unlike_ones_do_not():
    left, right = torch.zeros(8), torch.zeros(8)
    left[0], right[1] = 1, 1
    features = torch.where(torch.arange(6).view(1, 6, 1) < 3, left, right).expand(4, 6, 8).reshape(1, 24, 8)
    map = SuperTokens(cell=(2, 2)).reduce(View(features=features * 9, prefix=0, grid=(1, 4, 6), layer=0, layers=1))
    back = map.unmerge(map.apply(features))
    plain = features.view(4, 6, 8)[:, 2:4].mean((0, 1))  # the cell in the middle holds both kinds
    middle = back.view(4, 6, 8)[0, 2]
    assert (middle - left).norm() < 0.8 * (plain - left).norm()


def test_cells_of_one_patch_change_nothing():
    assert SuperTokens(cell=(1, 1)).reduce(view()) is None


def test_frames_with_a_prefix_each_are_refused():
    with pytest.raises(ThriftError, match="prefix each"):
        SuperTokens().reduce(view((2, 4, 4), 1, per_frame=True))


@pytest.mark.parametrize("cell", [2, (2,), (0, 2), (2.0, 2), "2x2", (True, 2)])
def test_bad_cells_are_refused(cell):
    with pytest.raises(ThriftError, match=r"write cell=\(2, 2\)"):
        SuperTokens(cell=cell)
    with pytest.raises(ThriftError, match=r"write cell=\(2, 2\)"):
        SuperTokenAttention(8, cell)


def test_other_bad_parameters_are_refused():
    for iterations in (0, 1001):
        with pytest.raises(ThriftError, match="at least 1 and at most 1000; 1 is the paper's"):
            SuperTokens(iterations=iterations)
    with pytest.raises(ThriftError, match="heads"):
        SuperTokenAttention(10, (2, 2), heads=3)


def test_plans_print_back_the_same():
    plan = Plan.parse("vision=super_tokens(cell=(4, 2), iterations=2)")
    assert Plan.parse(str(plan)) == plan == Plan.from_yaml(plan.to_yaml())
