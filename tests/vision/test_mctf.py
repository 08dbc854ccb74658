"""MCTF as a method: the authors' outputs, sizes, attention and sources; its budgets and poolings."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tokenthrift import Plan, ThriftError, View
from tokenthrift.core.view import Lazy
from tokenthrift.vision.mctf import MCTF, POOLINGS

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "vision" / "mctf.npz")
close = {"rtol": 1e-5, "atol": 1e-6}


def view(x, attention, sizes=None, prefix=1, layer=1, layers=4, grid=(1, 4, 4)):
    tokens = x.shape[1]
    return View(
        features=x,
        attention=lambda rows: attention[:, :, rows],
        sizes=torch.ones(x.shape[:2]) if sizes is None else sizes,
        protected=(torch.arange(tokens) < prefix).expand(x.shape[:2]),
        prefix=prefix,
        grid=grid,
        tokens=tokens,
        layer=layer,
        layers=layers,
    )


def some(tokens=17, batch=2, seed=0):
    torch.manual_seed(seed)
    return torch.randn(batch, tokens, 6), torch.randn(batch, 2, tokens, tokens).softmax(-1)


@pytest.mark.parametrize("case", ["bi_p0", "bi_p1", "uni_p0", "bi_simonly", "bi_max"])
def test_equals_the_official_fusion(case):
    g = {k: torch.from_numpy(GOLDEN[k]) for k in ("x", "attn", "size")}
    official = {k: torch.from_numpy(GOLDEN[f"{case}_{k}"]) for k in ("out", "size", "attn_next", "source")}
    both, pooling, tau_sim, tau_info, tau_size, prefix, r = GOLDEN[f"{case}_cfg"].tolist()
    method = MCTF(
        r=r, tau_sim=tau_sim, tau_info=tau_info, tau_size=tau_size, bidirectional=bool(both), pooling=POOLINGS[pooling]
    )
    seen = view(g["x"], g["attn"], g["size"].squeeze(-1), prefix)
    map = method.reduce(seen)

    first = official["source"].argmax(-1)  # the authors put the tokens left in A first: sort by the first source
    order = first.argsort(-1)
    mine = (map.dense() > 0).to(torch.uint8).argmax(-1).argsort(-1)

    def sort(x, order):
        return x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    assert torch.equal(sort((map.dense() > 0).float(), mine), sort(official["source"], order))
    torch.testing.assert_close(sort(method.combine(seen, map), mine), sort(official["out"], order), **close)
    torch.testing.assert_close(sort(map.sizes(seen.sizes).unsqueeze(-1), mine), sort(official["size"], order), **close)
    if pooling == 2:
        return  # their maximum over rows is no attention; see the docstring
    fused = map.dense()[:, None] @ g["attn"] @ (map.dense() > 0).float()[:, None].transpose(-1, -2)
    theirs = official["attn_next"]
    rows = order[:, None, :, None].expand_as(theirs)
    columns = order[:, None, None, :].expand_as(theirs)
    mine_rows, mine_columns = mine[:, None, :, None].expand_as(fused), mine[:, None, None, :].expand_as(fused)
    torch.testing.assert_close(
        fused.gather(2, mine_rows).gather(3, mine_columns), theirs.gather(2, rows).gather(3, columns), **close
    )
    torch.testing.assert_close(fused.sum(-1), torch.ones(fused.shape[:-1]), **close)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_poolings_average_or_take_the_maximum(pooling):
    x, attention = some()
    seen = view(x, attention, torch.rand(2, 17) + 1)
    method = MCTF(r=4, pooling=pooling)
    map = method.reduce(seen)
    out = method.combine(seen, map)
    weight = {
        "size": seen.sizes, "attention": seen.sizes * attention.mean((1, 2)), "mean": torch.ones(2, 17), "max": None,
    }[pooling]  # fmt: skip
    for row in range(2):
        for i in range(map.n_out):
            mine = map.owner[row] == i
            if pooling == "max":
                expected = x[row, mine].amax(0)
            else:
                w = weight[row, mine].unsqueeze(-1)
                expected = (w * x[row, mine]).sum(0) / w.sum()
            torch.testing.assert_close(out[row, i], expected, **close)
    assert torch.equal(out[:, 0], x[:, 0])
    assert map.unmerge(out).shape == x.shape
    torch.testing.assert_close(map.apply(map.unmerge(out)), out, **close)


@pytest.mark.parametrize(
    ("method", "layer"), [(MCTF(r=0), 2), (MCTF(keep=1.0), 3), (MCTF(r=8), 0), (MCTF(r=[5, 0]), 1), (MCTF(r=0.01), 2)]
)
def test_a_layer_without_reduction_computes_nothing(method, layer):
    def forbidden():
        raise AssertionError("a layer without reduction must compute nothing")

    seen = view(*some(), layer=layer)
    for part in ("attention", "sizes", "protected"):
        seen.offer(part, Lazy(forbidden))
    assert method.reduce(seen) is None


def test_without_the_attention_criterion_no_attention_is_computed():
    seen = view(*some())
    seen.offer("attention", Lazy(lambda: pytest.fail("not needed")))
    assert MCTF(r=4, tau_info=0).reduce(seen).n_out == 13


@pytest.mark.parametrize(("r", "left"), [(6, 11), (0.25, 13), (99, 10), (0.9, 10), ([9, 3], 14)])
def test_r_is_a_number_or_a_share_and_ten_tokens_stay(r, left):
    assert MCTF(r=r).reduce(view(*some())).n_out == left


def test_fewer_than_ten_tokens_are_left_alone():
    assert MCTF(r=4).reduce(view(*some(tokens=9))) is None


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_keep_is_met_after_the_last_layer(keep):
    tokens, left = 37, round(36 * keep) + 1
    for layer in range(6):
        map = MCTF(keep=keep).reduce(view(*some(tokens), layer=layer, layers=6, grid=(1, 6, 6)))
        assert layer or map is None
        tokens = tokens if map is None else map.n_out
    assert tokens == max(left, 10)


def test_the_fused_attention_is_a_choice():
    assert MCTF().fused_attention and not MCTF(one_step_ahead=False).fused_attention
    assert MCTF.placement == "boundary"


@pytest.mark.parametrize(
    ("wrong", "say"),
    [
        ({"r": 1.5}, "a share is below 1"),
        ({"r": -2}, "write r=8"),
        ({"keep": 0.0}, "not a share"),
        ({"keep": 0.3, "r": 4}, "not both"),
        ({"keep": 0.3, "r": 0.4}, "not both"),
        ({"tau_sim": -1.0}, "0 to turn it off"),
        ({"tau_info": float("nan")}, "0 to turn it off"),
        ({"pooling": "median"}, "write one of 'size'"),
    ],
)
def test_bad_parameters_say_what_to_write(wrong, say):
    with pytest.raises(ThriftError, match=say):
        MCTF(**wrong)


@pytest.mark.parametrize("call", ["mctf()", "mctf(r=16)", "mctf(r=0.1)", "mctf(r=(8, -1.0))", "mctf(pooling='max')"])
def test_plans_print_back_the_same(call):
    plan = Plan.parse(f"vision={call}")
    assert Plan.parse(str(plan)) == plan == Plan.from_yaml(plan.to_yaml())
