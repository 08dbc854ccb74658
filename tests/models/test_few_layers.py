"""The methods that reduce in a few layers, on models."""

import pytest
import torch

import tokenthrift as tt
from models.encoders import text_encoder, texts
from tokenthrift.ops.clustering import k_medoids
from tokenthrift.vision.evit import EViT
from vision.tiny import ENCODERS, build
from vision.views import view

MODELS = ("dinov2", "registers", "clip", "siglip")
LEFT = dict.fromkeys(("tps", "kmedoids", "dpc_knn", "sinkhorn", "token_transforming"), 9) | {"evit": 10}
"""Of 25 patches, 0.343 rounded up; evit has its fused token besides."""
close = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def pixels(batch=2, seed=1):
    return torch.randn(batch, 3, 40, 40, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("call", LEFT)
def test_runs_and_leaves_what_it_says(name, call):
    model, prefix = build(name, layers=4), ENCODERS[name][1]
    with tt.apply(f"vision={call}", model) as session:
        out = model(pixels()).last_hidden_state
    assert out.shape == (2, prefix + LEFT[call], 24) and out.isfinite().all()
    map = session.provenance()["vision"]
    w = map.dense()
    torch.testing.assert_close(w.sum(-1), torch.ones(w.shape[:2]))
    assert torch.equal(w[:, :prefix, :prefix], torch.eye(prefix).expand(2, -1, -1))
    if call != "kmedoids":
        torch.testing.assert_close(map.sizes().sum(-1), torch.full((2,), prefix + 25.0))


@pytest.mark.parametrize("call", [*LEFT, "centerclip"])
def test_keeping_all_is_bit_identical(call):
    model = build("clip", layers=4)
    full = "at=1, centers=1.0" if call == "centerclip" else "keep=1.0"
    with tt.apply(f"vision={call}({full})", model):
        out = model(pixels()).last_hidden_state
    assert torch.equal(out, model(pixels()).last_hidden_state)


@pytest.mark.parametrize("fuse", [True, False])
def test_evit_is_the_block_written_out(fuse):
    model, method = build("clip", layers=4), EViT(keep=0.25, layers=(1, 2), fuse=fuse)
    inputs = []
    handle = model.encoder.layers[0].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    model(pixels())
    handle.remove()
    h = inputs[0]
    for i, layer in enumerate(model.encoder.layers):
        attention = layer.self_attn
        q, k, v = (
            getattr(attention, f"{p}_proj")(layer.layer_norm1(h)).unflatten(-1, (2, 12)).transpose(1, 2) for p in "qkv"
        )
        weights = (q @ k.transpose(-1, -2) * 12**-0.5).softmax(-1)
        h = h + attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
        seen = view(h, layer=i, layers=4, attention=weights, start=26)
        if method.reduce(seen) is not None:
            h = method.combine(seen, method.reduce(seen))
        h = h + layer.mlp(layer.layer_norm2(h))
    with tt.apply(tt.Plan(vision=method), model):
        torch.testing.assert_close(model(pixels()).last_hidden_state, h, **close)


def test_centerclip_makes_one_sequence_of_a_segment():
    model, video = build("clip", layers=4), pixels(batch=6)
    hidden = model(video, output_hidden_states=True).hidden_states
    with tt.apply("vision=centerclip(at=2, frames=3, centers=9)", model) as session:
        out = model(video).last_hidden_state
    x = hidden[2].reshape(2, 3, 26, 24)
    patches = x[:, :, 1:].flatten(1, 2)
    medoids, _ = k_medoids(patches, 9)
    h = torch.cat([x[:, :, 0].mean(1, keepdim=True), patches.gather(1, medoids[..., None].expand(-1, -1, 24))], dim=1)
    for layer in model.encoder.layers[2:]:
        h = layer(h, None)
    torch.testing.assert_close(out, h, **close)
    map = session.provenance()["vision"]
    assert (map.n_in, map.n_out) == (3 * 26, 10)
    position = medoids // 25 * 26 + medoids % 25 + 1  # among all tokens of the three frames
    assert torch.equal(map.anchors[:, 1:], position)


def test_centerclip_needs_a_layer_that_exists():
    model = build("clip", layers=4)
    with tt.apply("vision=centerclip", model), pytest.raises(tt.ThriftError, match="write at=0 to at=3"):
        model(pixels())


@pytest.mark.parametrize("name", ["bert", "clip-text"])
@pytest.mark.parametrize("call", LEFT)
@pytest.mark.parametrize("lengths", [(16, 7, 16), (12, 7, 12)])
def test_padded_texts_are_reduced_as_if_alone(name, call, lengths):
    model, batch = text_encoder(name), texts(*lengths)
    plan = f"vision={call}(keep=0.6)"
    with tt.apply(plan, model):
        together = model(**batch).last_hidden_state
    for row, length in enumerate(lengths):
        alone = {k: v[row : row + 1, :length] for k, v in batch.items()}
        with tt.apply(plan, model):
            single = model(**alone).last_hidden_state
        torch.testing.assert_close(together[row, :length], single[0], **close)
    assert (together - model(**batch).last_hidden_state).abs().max() > 1e-3
