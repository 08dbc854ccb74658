"""tomesd as a method: the partition, what stays alone, and that nothing happens when nothing is asked for."""

import pytest
import torch

from tokenthrift import Plan, ThriftError, View
from tokenthrift.vision.tomesd import ToMeSD


def view(grid=(1, 4, 6), prefix=1, layer=0, batch=2, dim=8, seed=0):
    t, h, w = grid
    features = torch.randn(batch, prefix + t * h * w, dim, generator=torch.Generator().manual_seed(seed))
    return View(features=features, prefix=prefix, grid=grid, layer=layer, layers=4)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_half_of_the_patches_merge_and_the_prefix_stays(prefix):
    v = view(prefix=prefix)
    map = ToMeSD().reduce(v)
    assert map.n_out == prefix + 12
    assert torch.equal(map.apply(v.features)[:, :prefix], v.features[:, :prefix])
    assert (map.sizes()[:, :prefix] == 1).all()


def test_no_more_merge_than_give():
    assert ToMeSD(ratio=0.99).reduce(view()).n_out == 1 + 6  # one patch of each of six cells
    assert ToMeSD(ratio=0.99, sx=3, sy=4).reduce(view()).n_out == 1 + 2


@pytest.mark.parametrize("method", [ToMeSD(ratio=0.0), ToMeSD(sx=7), ToMeSD(sx=1, sy=1), ToMeSD(ratio=0.04)])
def test_nothing_to_merge_is_none(method):
    assert method.reduce(view(grid=(1, 4, 6))) is None


def test_draws_depend_on_seed_and_layer_alone():
    def draw(seed, layer):
        return ToMeSD(ratio=0.9, seed=seed).reduce(view(layer=layer)).anchors

    outs = [draw(0, 0), draw(0, 0), draw(0, 1), draw(9, 0)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[3])
    fixed = [ToMeSD(ratio=0.9, use_rand=False, seed=s).reduce(view(layer=s)).anchors for s in (0, 1)]
    assert torch.equal(*fixed)
    assert fixed[0][0].tolist() == [0, 1, 3, 5, 13, 15, 17]  # the top left patch of each cell, behind the prefix


def test_frames_have_cells_of_their_own():
    map = ToMeSD(ratio=0.9).reduce(view(grid=(3, 4, 4), prefix=0))
    assert map.n_out == 3 * 4
    assert torch.equal(map.anchors // 16, torch.arange(3).repeat_interleave(4).expand(2, -1))


def test_reduced_tokens_are_refused():
    v = view()
    v.offer("features", v.features[:, :-3])
    with pytest.raises(ThriftError, match="put no other reduction before"):
        ToMeSD().reduce(v)


def test_where_it_acts():
    assert ToMeSD.placement == "around"
    assert ToMeSD().on == ("attention",) and ToMeSD(mlp=True).on == ("attention", "mlp")


@pytest.mark.parametrize(
    ("bad", "said"),
    [({"ratio": 1.0}, "a share"), ({"ratio": -0.1}, "a share"), ({"sx": 0}, "sx=2"), ({"seed": -1}, "seed=0")],
)
def test_bad_parameters_are_refused(bad, said):
    with pytest.raises(ThriftError, match=said):
        ToMeSD(**bad)


def test_plans_print_back_the_same():
    plan = Plan.parse("vision=tomesd(ratio=0.7, sx=4, mlp=True)")
    assert Plan.parse(str(plan)) == plan == Plan.from_yaml(plan.to_yaml())
