"""MCTF and DiffRate in whole encoders: numbers of tokens, exactness against the blocks written out, texts."""

import pytest
import torch

import tokenthrift as tt
from models.encoders import text_encoder, texts
from tokenthrift.vision.diffrate import DiffRate
from tokenthrift.vision.mctf import MCTF
from vision.tiny import build

MODELS = ("dinov2", "vit", "siglip", "timm")
PLANS = ("mctf(keep=0.5)", "mctf(r=3, one_step_ahead=False)", "mctf(r=0.1, pooling='max')", "diffrate(keep=0.5)")
close = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def pixels():
    return torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))


def output(model, x):
    out = model(x)
    return getattr(out, "last_hidden_state", out)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("plan", PLANS)
def test_tokens_go_and_come_back(name, plan):
    model, x = build(name, layers=4), pixels()
    dense = output(model, x)
    with tt.apply(f"vision={plan}", model) as session:
        out = output(model, x)
    map, patches = session.provenance()["vision"], 25
    assert out.isfinite().all()
    if "0.1" not in plan:  # so few that the attention computed ahead costs more
        assert session.report().flops < session.report().flops_dense
    tokens = patches + (name != "siglip")
    assert map.n_in == tokens and map.n_out < tokens
    if "keep" in plan:
        assert map.n_out == tokens - 12
    if name != "timm":
        assert out.shape[1] == map.n_out and map.unmerge(out).shape == dense.shape
    if "diffrate" not in plan:
        assert map.kept.all()
    assert torch.equal(output(model, x), dense)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "plan", ["mctf(r=0)", "mctf(keep=1.0)", "diffrate(keep=1.0)", "diffrate(prune=[99, 99, 99, 99])"]
)
def test_no_reduction_is_bit_identical(name, plan):
    model, x = build(name, layers=4), pixels()
    dense = output(model, x)
    with tt.apply(f"vision={plan}", model):
        assert torch.equal(output(model, x), dense)


def attend(layer, h, sizes):
    a = layer.attention
    q, k, v = (getattr(a, f"{p}_proj")(layer.norm1(h)).unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for p in "qkv")
    return (q @ k.transpose(-1, -2) / a.head_dim**0.5 + sizes.log()[:, None, None]).softmax(-1), v


def mixed(layer, h, attention, v):
    return h + layer.layer_scale1(layer.attention.o_proj((attention @ v).transpose(1, 2).flatten(2)))


def shown(h, attention, sizes, i):
    return tt.View(
        features=h, attention=lambda rows: attention[:, :, rows], sizes=sizes, prefix=1, grid=(1, 5, 5), tokens=26,
        protected=(torch.arange(h.shape[1]) < 1).expand(h.shape[:2]), layer=i, layers=4,
    )  # fmt: skip


@pytest.mark.parametrize("pooling", ["size", "attention", "max"])
@pytest.mark.parametrize("ahead", [True, False])
def test_mctf_is_the_block_of_the_paper(pooling, ahead):
    model, x, method = build("dinov2", layers=4), pixels(), MCTF(r=4, pooling=pooling, one_step_ahead=ahead)
    h, sizes = model.embeddings(x), torch.ones(2, 26)
    for i, layer in enumerate(model.encoder.layer):
        attention, v = attend(layer, h, sizes)
        view = shown(h, attention, sizes, i)
        map = method.reduce(view)
        if map is not None:
            h, sizes = method.combine(view, map), map.sizes(sizes)
            again, v = attend(layer, h, sizes)
            shares = (map.dense() > 0).float()[:, None]
            attention = map.dense()[:, None] @ attention @ shares.transpose(-1, -2) if ahead else again
        h = mixed(layer, h, attention, v)
        h = h + layer.layer_scale2(layer.mlp(layer.norm2(h)))
    with tt.apply(tt.Plan(vision=method), model):
        torch.testing.assert_close(output(model, x), model.layernorm(h), **close)
    assert h.shape[1] == 26 - 3 * 4


def test_diffrate_is_the_block_of_the_paper():
    model, x, method = build("dinov2", layers=4), pixels(), DiffRate(prune=[26, 22, 22, 14], merge=[26, 20, 16, 14])
    h, sizes = model.embeddings(x), torch.ones(2, 26)
    for i, layer in enumerate(model.encoder.layer):
        attention, v = attend(layer, h, sizes)
        h = mixed(layer, h, attention, v)
        map = method.reduce(shown(h, attention, sizes, i))
        if map is not None:
            h, sizes = map.apply(h), map.sizes(sizes)
        h = h + layer.layer_scale2(layer.mlp(layer.norm2(h)))
    with tt.apply(tt.Plan(vision=method), model):
        torch.testing.assert_close(output(model, x), model.layernorm(h), **close)
    assert h.shape[1] == 14 and (sizes > 0).all() and sizes.sum(-1).max() < 26  # merged by similarity: some is lost


@pytest.mark.parametrize("name", ["bert", "distilbert", "clip-text"])
@pytest.mark.parametrize("plan", ["mctf(keep=0.7)", "mctf(r=2, one_step_ahead=False)", "diffrate(keep=0.7)"])
def test_texts_of_different_lengths_are_reduced_as_if_alone(name, plan):
    model, batch = text_encoder(name), texts(24, 17)
    with tt.apply(f"vision={plan}", model) as session:
        out = model(**batch).last_hidden_state
        alone = model(**texts_row(batch, 1, 17)).last_hidden_state
        assert session.report().stages["vision"].kept < 1
    torch.testing.assert_close(out[1:, :17], alone, **close)


def texts_row(batch, row, length):
    return {k: v[row : row + 1, :length] for k, v in batch.items()}
