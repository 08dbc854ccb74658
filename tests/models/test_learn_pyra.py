"""Learning PYRA's weights on a tiny random ViT."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification, ViTModel

from tokenthrift import Plan, ThriftError, apply
from tokenthrift.models.learn_pyra import feature_loss, learn_pyra
from tokenthrift.vision.pyra import Pyra, PyraWeights

TINY = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 40, "patch_size": 8}


@pytest.fixture(autouse=True)
def _quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def vit(kind=ViTModel, config=ViTConfig, **more):
    torch.manual_seed(0)
    model = kind(config(**TINY, **more)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    return model


def images(batches=2, seed=1):
    return list(torch.randn(batches, 4, 3, 40, 40, generator=torch.Generator().manual_seed(seed)))


def mean_loss(model, method, batches):
    with torch.no_grad():
        return sum(feature_loss(model, b, method, 1).item() for b in batches) / len(batches)


def test_the_loss_falls_below_that_of_tome(tmp_path):
    model, batches, seen = vit(), images(), []
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    model.embeddings.cls_token.requires_grad_(False)
    learned = learn_pyra(
        model, batches, Pyra(r=5), steps=40, lr=1e-2, progress=lambda *step: seen.append(step),
        out=tmp_path / "w.safetensors",
    )  # fmt: skip
    # the model is as it was
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["embeddings.cls_token"]
    assert all(p.grad is None for p in model.parameters())
    # it was told of every step
    assert [s[:2] for s in seen] == [(step, 40) for step in range(1, 41)]
    # and the weights help
    model.eval()
    assert mean_loss(model, learned, batches) < 0.97 * mean_loss(model, Pyra(r=5), batches)
    weights = PyraWeights.load(tmp_path / "w.safetensors")
    assert (weights.r, weights.dim, weights.model) == ([5, 5, 5], 24, "ViTModel")


def test_it_is_deterministic_and_the_file_is_what_was_learned(tmp_path):
    model = vit()
    a, b = (
        learn_pyra(model, images(), Pyra(r=[4, 0, 3]), steps=3, seed=7, out=tmp_path / f"{i}.safetensors")
        for i in range(2)
    )
    loaded = [PyraWeights.load(m.weights).parameters() for m in (a, b)]
    assert all(torch.equal(x, y) for x, y in zip(*loaded, strict=True))
    with torch.no_grad(), apply(f"vision=pyra(weights='{a.weights}')", model):
        first = model(images()[0]).last_hidden_state
    with torch.no_grad(), apply(Plan(vision=b), model):
        assert torch.equal(model(images()[0]).last_hidden_state, first)
    assert first.shape[1] == 26 - 7


def test_keep_becomes_the_removals_of_each_layer(tmp_path):
    learned = learn_pyra(vit(), images(), Pyra(keep=0.4), steps=1, out=tmp_path / "w.safetensors")
    r = PyraWeights.load(learned.weights).r
    assert len(r) == 3 and sum(r) == 15


@pytest.mark.parametrize("kind", ["inside a classifier", "dinov2"])
def test_other_models(tmp_path, kind):
    model = vit(Dinov2Model, Dinov2Config, layerscale_value=0.7) if kind == "dinov2" else vit(ViTForImageClassification)
    seen = []
    learn_pyra(
        model, images(), Pyra(r=5), steps=2, progress=lambda *s: seen.append(s[2]), out=tmp_path / "w.safetensors"
    )
    assert all(0 < loss < 1 for loss in seen)


def test_what_cannot_be_learned_is_refused(tmp_path):
    out = tmp_path / "w.safetensors"
    for batches, method, steps, said in [
        ([], Pyra(r=5), 1, "batches of images"),
        ([torch.zeros(1, 3, 40, 40), torch.zeros(1, 3, 48, 40)], Pyra(r=5), 1, "one height and width"),
        (images(), Pyra(r=5), 0, "at least one step"),
        (images(), Pyra(keep=1.0), 1, "nothing to learn"),
    ]:
        with pytest.raises(ThriftError, match=said):
            learn_pyra(vit(), batches, method, steps=steps, out=out)
    assert not out.exists()


def test_untrained_weights_are_tome_inside_a_model():
    model, x = vit(), images()[0]
    with torch.no_grad(), apply("vision=tome(r=5)", model):
        expected = model(x).last_hidden_state
    for untrained in (Pyra(r=5), Pyra().fresh([5, 5, 5], 24)):
        with torch.no_grad(), apply(Plan(vision=untrained), model):
            assert torch.equal(model(x).last_hidden_state, expected)
