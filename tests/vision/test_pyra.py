"""PYRA against the authors' numbers, its weights' files, and its rules."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tokenthrift import Plan, ThriftError, View
from tokenthrift.ops.matching import bipartite_soft_matching, merged_pairs
from tokenthrift.vision.pyra import Pyra, PyraLayer, PyraWeights
from tokenthrift.vision.tome import ToMe

GOLDEN = Path(__file__).parents[1] / "golden" / "vision" / "pyra_merge.npz"
close = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def golden():
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN).items()}


def view(g, layer=0, layers=1, **parts):
    batch, tokens, _ = g["x"].shape
    protected = (torch.arange(tokens) < 1).expand(batch, tokens)
    parts = {"features": g["x"], "keys": g["metric"].unsqueeze(1), "sizes": g["size"].squeeze(-1)} | parts
    return View(protected=protected, prefix=1, grid=(1, 4, 4), layer=layer, layers=layers, **parts)


def sorted_rows(x):
    """The authors' order of the merged tokens differs from ours."""
    return x[torch.arange(len(x)).unsqueeze(-1), x[..., 0].argsort(-1)]


def official(g):
    layer = PyraLayer(g["pyra_a"], g["pyra_b"][0], g["ln_w"], g["ln_b"])
    return PyraWeights([int(g["r"])], 8, [layer], "a ViT")


def test_equals_the_official_merge(golden):
    method, v = Pyra(weights=official(golden)), view(golden)
    map = method.reduce(v)
    torch.testing.assert_close(sorted_rows(method.combine(v, map)), sorted_rows(golden["out"]), **close)
    torch.testing.assert_close(sorted_rows(map.apply(v.features)), sorted_rows(golden["out_without_pyra"]), **close)
    assert torch.equal(map.sizes(v.sizes).sort().values, golden["out_size"].squeeze(-1).sort().values)
    half = view(golden, features=golden["x"].to(torch.bfloat16))
    assert method.combine(half, map).dtype == torch.bfloat16


def test_pairs_come_best_match_first(golden):
    metric = golden["metric"]
    map = bipartite_soft_matching(metric, 5).map(golden["size"].squeeze(-1))
    sources, receivers = merged_pairs(map, metric)
    unit = torch.nn.functional.normalize(metric, dim=-1)
    for row in range(2):
        scores = unit[row, ::2] @ unit[row, 1::2].T
        best = scores.max(-1)
        order = best.values.argsort(descending=True)[:5]
        assert sources[row].tolist() == (2 * order).tolist()
        assert receivers[row].tolist() == (2 * best.indices[order] + 1).tolist()


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_pairs_of_protected_batches(prefix):
    torch.manual_seed(0)
    metric, protected = torch.randn(3, 16, 4), (torch.arange(16) < prefix).expand(3, 16)
    map = bipartite_soft_matching(metric, 4, protected).map()
    sources, receivers = merged_pairs(map, metric)
    assert sources.shape == (3, 4) and (sources >= prefix).all() and (receivers % 2 == 1).all()
    assert torch.equal(map.owner.gather(1, sources), map.owner.gather(1, receivers))
    score = torch.nn.functional.cosine_similarity(metric[0, sources[0]], metric[0, receivers[0]], dim=-1)
    assert (score.diff() <= 0).all()


@pytest.mark.parametrize("untrained", [Pyra(r=5), Pyra().fresh([5], 8)], ids=["no weights", "fresh weights"])
def test_untrained_is_tome(golden, untrained):
    v = view(golden)
    map, plain = untrained.reduce(v), ToMe(r=5).reduce(v)
    assert torch.equal(map.target, plain.target)
    assert torch.equal(untrained.combine(v, map), plain.apply(v.features))


def test_untrained_takes_keep_and_r_as_tome_does(golden):
    v = view(golden)
    assert Pyra(keep=0.25).reduce(v).n_out == ToMe(keep=0.25).reduce(v).n_out
    assert Pyra(r=0).reduce(v) is None and Pyra(keep=1.0).reduce(v) is None
    with pytest.raises(ThriftError, match="not both"):
        Pyra(keep=0.25, r=3)


def test_gradients_reach_the_weights(golden):
    method = Pyra().fresh([5], 8)
    parameters = [t.requires_grad_() for t in method.weights.parameters()]
    v = view(golden)
    method.combine(v, method.reduce(v)).square().sum().backward()
    assert parameters[1].grad.abs().sum() > 0  # b, which is zero: a and the norm follow once it has moved


# ---- files -----------------------------------------------------------------------------------------------------------


def saved(tmp_path, r=(5, 0, 2), dim=8):
    weights = PyraWeights.fresh(list(r), dim, "facebook/dinov2-small", seed=3)
    weights.layers[0].b.normal_()
    weights.save(tmp_path / "weights.safetensors")
    return weights, str(tmp_path / "weights.safetensors")


def test_weights_load_back(tmp_path, golden):
    weights, path = saved(tmp_path)
    loaded = PyraWeights.load(path)
    assert (loaded.r, loaded.dim, loaded.model) == ([5, 0, 2], 8, "facebook/dinov2-small")
    assert loaded.layers[1] is None
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), weights.parameters(), strict=True))
    by_file, in_memory = Plan.parse(f"pyra(weights='{path}')").at("vision")[0], Pyra(weights=weights)
    v = view(golden, layers=3)
    map = by_file.reduce(v)
    assert torch.equal(by_file.combine(v, map), in_memory.combine(v, map))
    assert by_file.reduce(view(golden, layer=1, layers=3)) is None
    assert Plan.parse(str(Plan(vision=by_file))) == Plan(vision=by_file)


def test_r_beside_weights_must_be_theirs(tmp_path):
    _, path = saved(tmp_path)
    Pyra(weights=path, r=[5, 0, 2])
    with pytest.raises(ThriftError, match=r"dinov2-small.*trained for r=\[5, 0, 2\]: leave r out"):
        Pyra(weights=path, r=4)
    with pytest.raises(ThriftError, match="leave keep out"):
        Pyra(weights=path, keep=0.25)


@pytest.mark.parametrize(
    ("parts", "layers", "said"),
    [
        ({}, 4, "3 layers of 8 channels, this model has 4 of 8: train"),
        ({"features": torch.zeros(2, 17, 12)}, 3, "3 layers of 8 channels, this model has 3 of 12"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, golden, parts, layers, said):
    _, path = saved(tmp_path)
    with pytest.raises(ThriftError, match=said):
        Pyra(weights=path).reduce(view(golden, layers=layers, **parts))


def test_images_smaller_than_in_training_are_refused(tmp_path, golden):
    _, path = saved(tmp_path)
    small = {k: v[:, :7] if v.dim() == 3 else v for k, v in golden.items()}
    with pytest.raises(ThriftError, match="remove 5 tokens in layer 0, these images have only 3 to merge"):
        Pyra(weights=path).reduce(view(small, layers=3))


def test_files_that_are_no_weights_are_refused(tmp_path):
    with pytest.raises(ThriftError, match="is no file: train them"):
        Pyra(weights=str(tmp_path / "none.safetensors"))
    with pytest.raises(ThriftError, match="weights=7 is no file"):
        Pyra(weights=7)
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors")
    other, damaged = tmp_path / "other.safetensors", tmp_path / "damaged.safetensors"
    save_file({"w": torch.zeros(2)}, other)
    weights = PyraWeights.fresh([5], 8)
    weights.layers[0] = weights.layers[0]._replace(b=torch.zeros(7))
    weights.save(damaged)
    for path, said in [(text, "no file of pyra weights"), (other, "no file of pyra weights"), (damaged, "damaged")]:
        with pytest.raises(ThriftError, match=said):
            Pyra(weights=str(path))


def test_a_name_that_no_file_can_have():
    with pytest.raises(ThriftError, match="is no file"):
        Pyra(weights="x" * 5000)
