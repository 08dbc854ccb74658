"""ToFu: pruning first, MLERP later. The numbers of golden/vision/tofu_mlerp.npz are those of a third party's code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenthrift as tt
from tokenthrift import Plan, ThriftError, View
from tokenthrift.core.tokenmap import TokenMap
from tokenthrift.ops.matching import bipartite_soft_matching
from tokenthrift.vision.tofu import ToFu, mlerp
from vision.tiny import ENCODERS, RETURN_TOKENS, build, run

GOLDEN = Path(__file__).parents[1] / "golden" / "vision" / "tofu_mlerp.npz"
close = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def view(x, metric, layer=0, layers=4, sizes=None, prefix=1):
    batch, n, _ = x.shape
    return View(
        features=x,
        keys=metric.unsqueeze(1),
        sizes=torch.ones(batch, n) if sizes is None else sizes,
        protected=(torch.arange(n) < prefix).expand(batch, n),
        prefix=prefix,
        grid=(1, 1, n - prefix),
        layer=layer,
        layers=layers,
    )


def groups_of(x, map):
    """The tokens of every group, row by row."""
    for row in range(x.shape[0]):
        for group in range(map.n_out):
            yield row, group, x[row, map.owner[row] == group]


def test_matching_and_merging_are_those_of_the_reimplementation():
    g = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN).items()}
    x, r = g["x"], 5
    protected = (torch.arange(17) < 1).expand(2, -1)
    groups = bipartite_soft_matching(g["metric"], r, protected, order="official")
    map = groups.map()
    torch.testing.assert_close(map.apply(x), g["out_mean"], **close)
    largest = torch.empty_like(g["out_amax"])
    rescaled = torch.empty_like(g["out_tofu"])
    for row, group, tokens in groups_of(x, map):
        largest[row, group] = tokens.amax(0)
        # That code divides by the norm of the receiving token, where MLERP divides by that of the mean.
        receiver = x[row, groups.anchor[row, group]]
        rescaled[row, group] = tokens.mean(0) / receiver.norm() * tokens.norm(dim=-1).max()
    torch.testing.assert_close(largest, g["out_amax"], **close)
    torch.testing.assert_close(rescaled, g["out_tofu"], **close)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(3, 16), r=st.integers(1, 8), seed=st.integers(0, 2**16))
def test_mlerp_keeps_the_direction_of_the_mean_and_the_largest_norm(tokens, r, seed):
    torch.manual_seed(seed)
    x, sizes = torch.randn(2, tokens, 6), torch.rand(2, tokens) + 0.5
    seen = view(x, torch.randn(2, tokens, 4), layer=3, sizes=sizes)
    method = ToFu(r=r)
    map = method.reduce(seen)
    out = method.combine(seen, map)
    mean = map.apply(x)
    for row, group, members in groups_of(x, map):
        if len(members) == 1:
            assert torch.equal(out[row, group], members[0])
            continue
        torch.testing.assert_close(out[row, group].norm(), members.norm(dim=-1).max(), **close)
        cosine = torch.cosine_similarity(out[row, group], mean[row, group], dim=0)
        torch.testing.assert_close(cosine, torch.tensor(1.0), **close)
    torch.testing.assert_close(map.sizes(sizes).sum(-1), sizes.sum(-1), **close)


def test_mlerp_of_tokens_that_cancel_out_is_zero_and_half_precision_stays():
    map = TokenMap.merge(torch.tensor([[0, 0, 1]]))
    x = torch.tensor([[[1.0, 0], [-1, 0], [3, 4]]])
    assert torch.equal(mlerp(x, map), torch.tensor([[[0.0, 0], [3, 4]]]))
    assert mlerp(x.bfloat16(), map).dtype == torch.bfloat16


def test_early_layers_prune_and_later_ones_merge():
    torch.manual_seed(0)
    x, metric = torch.randn(2, 17, 6), torch.randn(2, 17, 4)
    merged = bipartite_soft_matching(metric, 4, (torch.arange(17) < 1).expand(2, -1))
    for layer in range(5):
        seen = view(x, metric, layer, layers=5)
        map = ToFu(r=4).reduce(seen)
        assert map.n_out == 13 and map.is_selection == (layer < 3)
        assert torch.equal(map.anchors, merged.anchor)
        if layer < 3:
            kept = x.gather(1, merged.anchor.unsqueeze(-1).expand(-1, -1, 6))
            assert torch.equal(ToFu(r=4).combine(seen, map), kept)
    assert not ToFu(r=4, prune=0.0).reduce(view(x, metric)).is_selection
    assert ToFu(r=4, prune=1.0).reduce(view(x, metric, layer=3)).is_selection
    assert ToFu(r=0).reduce(view(x, metric)) is None
    assert ToFu(keep=1.0).reduce(view(x, metric)) is None


@pytest.mark.parametrize(
    ("call", "match"),
    [
        ("tofu(keep=2)", "tofu keep=2 is not a share"),
        ("tofu(keep=0.25, r=1)", "not both"),
        ("tofu(prune=-1)", "tofu prune=-1 is no share of the layers"),
        ("tofu(r=-1)", "write r=8"),
    ],
)
def test_bad_parameters_are_refused(call, match):
    with pytest.raises(ThriftError, match=match):
        Plan.parse(f"vision={call}")


@pytest.mark.parametrize("name", RETURN_TOKENS)
def test_vision_encoders_run_it(name):
    model, prefix = build(name), ENCODERS[name][1]
    dense = run(model)
    with tt.apply("vision=tofu(keep=0.4)", model) as session:
        out = run(model)
    map = session.provenance()["vision"]
    assert out.isfinite().all() and map.n_out == out.shape[1] == prefix + 10
    assert torch.equal(map.owner[:, :prefix], torch.arange(prefix).expand(2, -1))
    with tt.apply("vision=tofu(keep=1.0)", model):
        assert torch.equal(run(model), dense)


def test_without_pruning_a_layer_is_the_mlerp_block_written_out():
    model = build("dinov2")
    inputs, outputs = [], []
    layer = model.encoder.layer[2]
    with tt.apply("vision=tofu(r=[0, 0, 5], prune=0.0)", model) as session:
        handles = [
            layer.norm2.register_forward_pre_hook(lambda m, args: inputs.append(args[0]), prepend=True),
            layer.register_forward_hook(lambda m, args, out: outputs.append(out)),
        ]
        run(model)
        for handle in handles:
            handle.remove()
    merged = mlerp(inputs[0], session.provenance()["vision"])
    want = merged + layer.layer_scale2(layer.mlp(layer.norm2(merged)))
    torch.testing.assert_close(outputs[0], want, **close)
