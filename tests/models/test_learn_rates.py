"""Learning DiffRate's numbers on tiny encoders: what is trained is what is applied, and the model stays as it was."""

from contextlib import ExitStack

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

import tokenthrift as tt
from models.encoders import TimmLike
from tokenthrift.models import learn_rates as module
from tokenthrift.models.learn_rates import learn_rates, write_rates

TINY = {"hidden_size": 24, "num_hidden_layers": 6, "num_attention_heads": 2, "image_size": 40, "patch_size": 8}
MODELS = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**TINY, layerscale_value=0.7)),
    "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TINY, num_register_tokens=2)),
    "vit": lambda: ViTModel(ViTConfig(**TINY, intermediate_size=48)),
    "timm": lambda: TimmLike(depth=6),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**TINY, intermediate_size=48)),
}


def build(name, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    return model


@pytest.fixture(autouse=True)
def _quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def images(n=3, batch=2, size=40, seed=1):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, batch, 3, 4, 4, generator=generator)  # patches that have something in common
    return [torch.nn.functional.interpolate(x, (size, size), mode="bilinear") for x in coarse]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("flops", [0.5, 0.8])
def test_the_target_is_met_and_the_loss_falls(name, flops, tmp_path):
    model = build(name)
    told = []
    schedule = learn_rates(model, images(), flops=flops, steps=25, lr=0.1, progress=lambda *a: told.append(a))
    assert told[0] == (1, 25) and told[-1] == (25, 25)
    assert abs(schedule["flops"] - flops) < 0.05 * flops
    assert schedule["loss"][1] < schedule["loss"][0]
    prune, merge = schedule["prune"], schedule["merge"]
    assert prune[0] == merge[0] == schedule["tokens"]
    seen = [n for pair in zip(prune, merge, strict=True) for n in pair]
    assert seen == sorted(seen, reverse=True) and seen[-1] > schedule["tokens"] - 25

    write_rates(schedule, tmp_path / "rates.json")
    with tt.apply(tt.Plan.parse(f"diffrate(schedule='{tmp_path / 'rates.json'}')"), model) as session:
        model(images()[0])
    assert session.provenance()["vision"].n_out == merge[-1]
    report = session.report()
    assert abs(report.flops / report.flops_dense - schedule["flops"]) < 1e-5


def test_the_masked_forward_is_the_applied_one():
    """What training computes with all tokens in place is what ``diffrate`` computes without them."""
    model, (x,) = build("dinov2"), images(1)
    with ExitStack() as undo:
        learner = module._Learner(model, undo)
        _, dense = learner.run(x)
        learner.start(dense, 0.6)
        prune, merge = learner.numbers()
        features, now = learner.run(x)
    with tt.apply(tt.Plan.parse(f"diffrate(prune={prune}, merge={merge})"), model) as session:
        out = model(x).last_hidden_state
    map = session.provenance()["vision"]
    left = now.mask > 0
    assert left.sum(-1).tolist() == [map.n_out] * 2
    anchors = left.nonzero()[:, 1].view(2, -1)
    assert torch.equal(now.owner >= 0, map.owner >= 0)
    assert torch.equal(anchors.gather(1, map.owner.clamp(min=0))[map.kept], now.owner[map.kept])
    # sizes differ (training keeps them at 1 or more), and the masked softmax has its epsilon
    assert (features[left].view_as(out) - out).abs().max() < 0.2
    assert torch.nn.functional.cosine_similarity(features[left].view_as(out), out, dim=-1).min() > 0.99


def test_the_model_is_left_as_it_was():
    model = build("vit").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.layers[0].eval()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    learn_rates(model, images(1), flops=0.6, steps=2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.training and not model.layers[0].training and model.layers[1].training
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert model.config._attn_implementation == "sdpa"


def test_the_same_seed_learns_the_same():
    a, b = (learn_rates(build("dinov2"), images(), flops=0.6, steps=4, lr=0.1, seed=3) for _ in range(2))
    assert a == b


def test_a_classifier_s_encoder_and_batches_by_keyword():
    torch.manual_seed(0)
    model = Dinov2ForImageClassification(Dinov2Config(**TINY)).eval()
    schedule = learn_rates(model, [{"pixel_values": x} for x in images(2)], flops=0.6, steps=2)
    assert len(schedule["prune"]) == 6 and schedule["model"] == "Dinov2ForImageClassification"


@pytest.mark.parametrize(
    ("batches", "more", "say"),
    [
        ([], {}, "at least one batch"),
        (images(1), {"flops": 1.2}, r"share in \(0, 1\]"),
        (images(1), {"flops": 0.05}, "out of reach"),
        (images(1), {"steps": 0}, "at least 1"),
        ([*images(1), *images(1, size=32)], {}, "one size"),
    ],
)
def test_bad_input_says_what_to_do(batches, more, say):
    with pytest.raises(tt.ThriftError, match=say):
        learn_rates(build("dinov2"), batches, **{"flops": 0.6, "steps": 1, **more})


def test_encoders_of_texts_are_refused():
    text = BertModel(BertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48))
    with pytest.raises(tt.ThriftError, match="encodes texts"):
        learn_rates(text, images(1), flops=0.6, steps=1)
