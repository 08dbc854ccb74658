"""ToMe as a method: its parameters and what it decides. That models obey is tested in tests/models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenthrift import Plan, ThriftError, View
from tokenthrift.core.view import Lazy
from tokenthrift.vision.tome import ToMe

GOLDEN = Path(__file__).parents[1] / "golden" / "vision" / "tome_bsm.npz"


@pytest.mark.parametrize(
    "r", [-1, 2.5, True, "8", (8,), (8, 2.0), (8, -1.5), (-8, 0.5), [4, -1], [4.0, 2, 1], (4, 4, 2)]
)
def test_bad_r_is_refused_with_what_to_write(r):
    with pytest.raises(ThriftError, match=r"write r=8"):
        ToMe(r=r)


@pytest.mark.parametrize("keep", [0, -0.5, 1.5, float("nan"), True, "half", None])
def test_bad_keep_is_refused(keep):
    with pytest.raises(ThriftError, match=r"not a share in \(0, 1\]"):
        ToMe(keep=keep)


def test_keep_and_r_together_are_refused():
    with pytest.raises(ThriftError, match="not both"):
        ToMe(keep=0.25, r=8)


@pytest.mark.parametrize(
    "call", ["tome()", "tome(r=8)", "tome(r=(8, -1.0))", "tome(r=[8, -1.0])", "tome(r=[4, 2])", "tome(order=official)"]
)
def test_plans_with_tome_print_back_the_same(call):
    plan = Plan.parse(f"vision={call}")
    assert Plan.parse(str(plan)) == plan == Plan.from_yaml(plan.to_yaml())


def view(tokens, layer=0, layers=4, grid=(1, 4, 4), prefix=1, **more):
    def forbidden():
        raise AssertionError("a layer without reduction must compute nothing")

    parts = {"keys": Lazy(forbidden), "sizes": Lazy(forbidden), "protected": Lazy(forbidden)} | more
    features = torch.zeros(2, tokens, 8)
    return View(features=features, layer=layer, layers=layers, grid=grid, prefix=prefix, **parts)


@pytest.mark.parametrize(("method", "layer"), [(ToMe(r=0), 0), (ToMe(keep=1.0), 3), (ToMe(r=[4]), 1)])
def test_a_layer_without_reduction_computes_nothing(method, layer):
    assert method.reduce(view(17, layer)) is None


def seen(tokens, prefix=1):
    protected = (torch.arange(tokens) < prefix).expand(2, tokens)
    return {"keys": torch.randn(2, 3, tokens, 4), "sizes": torch.ones(2, tokens), "protected": protected}


@settings(deadline=None)
@given(
    side=st.integers(2, 7), prefix=st.integers(0, 5), layers=st.integers(4, 12), keep=st.floats(0.2, 1.0)
)  # 0.2 needs three halvings
def test_keep_is_met_exactly_after_the_last_layer(side, prefix, layers, keep):
    tokens = side * side + prefix
    for layer in range(layers):
        parts = seen(tokens, prefix)
        map = ToMe(keep=keep).reduce(view(tokens, layer, layers, (1, side, side), prefix, **parts))
        tokens = tokens if map is None else map.n_out
    wanted = max(int(keep * side * side + 0.5), 1)
    assert tokens - prefix == wanted or side * side <= 9  # few tokens: odd ones out may lack a partner


def test_the_map_weighs_by_size_and_averages_the_heads():
    torch.manual_seed(0)
    parts = seen(9)
    parts["sizes"] = torch.rand(2, 9) + 1
    map = ToMe(r=3).reduce(view(9, **parts))
    one_head = parts | {"keys": parts["keys"].mean(1, keepdim=True)}
    assert torch.equal(map.target, ToMe(r=3).reduce(view(9, **one_head)).target)
    mass = torch.zeros(2, map.n_out).scatter_add_(1, map.target, parts["sizes"])
    torch.testing.assert_close(map.weight, parts["sizes"] / mass.gather(1, map.target))


def test_too_large_an_r_is_clipped_to_half_and_said():
    with pytest.warns(UserWarning, match="r=99 is more than half of a layer's tokens"):
        assert ToMe(r=99).reduce(view(17, **seen(17))).n_out == 9


def test_two_layers_in_the_official_order_give_the_authors_tokens():
    g = {k.removeprefix("chain_"): torch.from_numpy(v) for k, v in np.load(GOLDEN).items() if k.startswith("chain_")}
    method = ToMe(r=[int(g["r1"]), int(g["r2"])], order="official")
    x, sizes, maps = g["x"], torch.ones(2, 17), []
    for layer, metric in enumerate((g["metric1"], g["metric2"])):
        keys = torch.stack([metric - 1, metric + 1], dim=1)  # two heads, whose mean is compared
        protected = (torch.arange(x.shape[1]) < 1).expand(2, -1)
        maps.append(method.reduce(view(x.shape[1], layer, keys=keys, sizes=sizes, protected=protected)))
        x, sizes = maps[-1].apply(x), maps[-1].sizes(sizes)
        torch.testing.assert_close(x, g[f"x{layer + 1}"])
        torch.testing.assert_close(sizes.unsqueeze(-1), g[f"s{layer + 1}"])
    assert torch.equal((maps[0].then(maps[1]).dense() > 0).float(), g["source"])


def test_an_unknown_order_is_refused():
    with pytest.raises(ThriftError, match="tome has no order='offical': did you mean 'official'"):
        ToMe(order="offical")
