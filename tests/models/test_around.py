"""Methods around sub-layers, from a plan to the model: the stream keeps its length, few tokens attend."""

import pytest
import torch
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, SiglipVisionConfig, SiglipVisionModel

import tokenthrift as tt
from models.encoders import TimmLike, spread
from tokenthrift.core.plan import Plan

TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 40, "patch_size": 8}


def dinov2():
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TINY, num_register_tokens=3))


def siglip():
    return SiglipVisionModel(SiglipVisionConfig(**TINY, intermediate_size=48))


def build(make):
    torch.manual_seed(0)
    return spread(make().eval().requires_grad_(False))


def pixels(height=40, width=56):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


PLANS = ["tomesd(ratio=0.6)", "tomesd(mlp=True, use_rand=False)", "super_tokens()", "super_tokens(cell=(3, 2))"]


@pytest.mark.parametrize("plan", PLANS)
def test_equals_the_reduction_written_out(plan):
    model, x, method = build(dinov2), pixels(), Plan.parse(f"vision={plan}").at("vision")[0]
    h = model.embeddings(x)
    for i, layer in enumerate(model.encoder.layer):
        map = method.reduce(tt.View(features=h, prefix=4, grid=(1, 5, 7), layer=i, layers=2))
        assert map.n_out < map.n_in == h.shape[1] == 4 + 35
        y = layer.attention(map.dense() @ layer.norm1(h))[0]
        h = h + layer.layer_scale1(map.unmerge(y))
        y = layer.norm2(h)
        y = map.unmerge(layer.mlp(map.dense() @ y)) if "mlp" in method.on else layer.mlp(y)
        h = h + layer.layer_scale2(y)
    with tt.apply(f"vision={plan}", model) as session:
        out = model(x).last_hidden_state
    torch.testing.assert_close(out, model.layernorm(h), rtol=1e-4, atol=1e-5)
    report = session.report()
    assert report.flops < report.flops_dense


@pytest.mark.parametrize("make", [dinov2, siglip, TimmLike])
@pytest.mark.parametrize("plan", PLANS)
def test_runs_on_unlike_encoders_and_restores_them(make, plan):
    model = build(make)
    x = pixels(40, 40)

    def run():
        out = model(x)
        return out if isinstance(out, torch.Tensor) else out.last_hidden_state

    dense = run()
    with tt.apply(f"vision={plan}", model):
        out = run()
        assert out.shape == dense.shape and not torch.equal(out, dense) and out.isfinite().all()
        assert torch.equal(run(), out)
    assert torch.equal(run(), dense)


@pytest.mark.parametrize("plan", ["tomesd(ratio=0.0)", "tomesd(sx=9)", "super_tokens(cell=(1, 1))", "fastvggt()"])
def test_nothing_to_merge_is_bit_identical(plan):
    model, x = build(dinov2), pixels()
    dense = model(x).last_hidden_state
    with tt.apply(f"vision={plan}", model):
        assert torch.equal(model(x).last_hidden_state, dense)
