"""What is compared, and counted, on one input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import tokenthrift as tt
from tokenthrift.bench.data import Data, Document, Prompt, default_data
from tokenthrift.bench.fidelity import EncoderFidelity, LanguageFidelity, fidelity_of
from tokenthrift.bench.loading import Loaded
from tokenthrift.core.errors import ThriftError
from tokenthrift.core.plan import Plan

from .tiny import a_text, tiny_model, tiny_tokenizer
from .tiny_vision import PROCESSOR, save_images, tiny_encoder

PLAN = Plan.parse("vision=tome(r=4)")
TEXTS = Data("", documents=(Document("a", a_text(500)),), prompts=(Prompt("b", a_text(60)), Prompt("c", "Hi there")))


def images(folder: Path, count: int = 3) -> Data:
    return Data("", images=tuple(sorted(save_images(folder, count).iterdir())))


def of_encoder(model: Any, folder: Path) -> EncoderFidelity:
    made = fidelity_of(Loaded("tiny", model, PROCESSOR), images(folder), "vision", 8, 0)
    assert isinstance(made, EncoderFidelity)
    return made


def test_unmerged_features_are_compared(tmp_path: Path) -> None:
    model = tiny_encoder()
    fidelity = of_encoder(model, tmp_path)
    assert (len(fidelity), fidelity.prefix, fidelity.unit) == (3, 1, "FLOPs")
    loss, cost, dense = fidelity.measure(PLAN, 1)
    with torch.no_grad():
        full = model(**fidelity.inputs[1]).last_hidden_state
        with tt.apply(PLAN, model) as session:
            merged = model(**fidelity.inputs[1]).last_hidden_state
    features = session.provenance()["vision"].unmerge(merged)  # type: ignore[union-attr]
    cosine = torch.nn.functional.cosine_similarity(features, full, dim=-1)[0]
    assert loss == pytest.approx(1 - float(cosine[0] / 2 + cosine[1:].mean() / 2), abs=1e-6)
    assert (cost, dense) == (session.report().flops, session.report().flops_dense)
    assert 0 < cost < dense
    assert fidelity.measure(Plan.parse("vision=tome(r=0)"), 1).loss == pytest.approx(0, abs=1e-6)


def test_models_with_a_head_are_compared_at_the_encoder(tmp_path: Path) -> None:
    inner = tiny_encoder()
    head = Dinov2ForImageClassification(Dinov2Config(**{**inner.config.to_dict(), "num_labels": 3})).eval()
    head.dinov2.load_state_dict(inner.state_dict())
    alone, within = (of_encoder(m, tmp_path).measure(PLAN, 0) for m in (inner, head))
    assert within.loss == pytest.approx(alone.loss, abs=1e-6)
    assert within.cost == alone.cost


def test_encoders_without_cls(tmp_path: Path) -> None:
    config = SiglipVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=8
    )
    fidelity = of_encoder(SiglipVisionModel(config).eval(), tmp_path)
    assert fidelity.prefix == 0
    assert fidelity.measure(PLAN, 0).loss > 0


@pytest.mark.parametrize("stage", ["cache", "attention"])
def test_language_models(stage: str) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    fidelity = fidelity_of(Loaded("tiny", model, tokenizer), TEXTS, stage, 4, 0)
    assert isinstance(fidelity, LanguageFidelity)
    plan = Plan.parse("cache=streaming_llm(budget=16)")
    loss, cost, dense = fidelity.measure(plan, 0)
    head, tail = fidelity.inputs[0]
    assert tail.shape[1] == 32
    with torch.no_grad():
        full = model(torch.cat([head, tail[:, :-1]], 1)).logits[0, head.shape[1] - 1 :].log_softmax(-1)
        with tt.apply(plan, model) as session:
            first = model(head, use_cache=True, logits_to_keep=1)
            rest = model(tail[:, :-1], past_key_values=first.past_key_values)
    reduced = torch.cat([first.logits[0, -1:], rest.logits[0]]).log_softmax(-1)
    assert loss == pytest.approx(float((full.exp() * (full - reduced)).sum(-1).mean()), rel=1e-3)
    report = session.report()
    if stage == "cache":
        assert (cost, dense) == (report.stages["cache"].bytes_after, report.stages["cache"].bytes_before)
    else:
        assert (cost, dense) == (report.flops, report.flops_dense)
    assert fidelity.measure(Plan(), 0).loss == 0


def test_encoders_of_text() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=260, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    fidelity = fidelity_of(Loaded("bert", BertModel(config).eval(), tiny_tokenizer()), TEXTS, "vision", 4, 0)
    assert isinstance(fidelity, EncoderFidelity)
    loss, cost, dense = fidelity.measure(PLAN, 0)
    assert loss > 0
    assert cost < dense


def test_inputs_are_drawn_by_the_seed(tmp_path: Path) -> None:
    data, loaded = images(tmp_path, 6), Loaded("tiny", tiny_encoder(), PROCESSOR)
    prints = [fidelity_of(loaded, data, "vision", 3, seed).fingerprint() for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    assert len(fidelity_of(loaded, data, "vision", 3, 0)) == 3


@pytest.mark.parametrize(
    ("model", "processor", "data", "says"),
    [
        (tiny_encoder, PROCESSOR, TEXTS, "reads images"),
        (tiny_encoder, None, default_data(), "pass its image processor"),
        (tiny_encoder, PROCESSOR, Data("", images=default_data().images[:1]), "at least 2 images"),
        (tiny_model, tiny_tokenizer(), Data("", images=default_data().images), "reads text"),
        (tiny_model, None, TEXTS, "pass its tokenizer"),
        (tiny_model, tiny_tokenizer(), Data("", documents=(Document("a", "Too short"),)), "at least 2 texts"),
    ],
)
def test_data_that_does_not_fit(model: Any, processor: Any, data: Data, says: str) -> None:
    with pytest.raises(ThriftError, match=says):
        fidelity_of(Loaded("tiny", model(), processor), data, "vision", 8, 0)
