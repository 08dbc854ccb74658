"""GlobEnc and DecompX against the authors' code on a tiny BERT, and what their attributions must sum to."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from tokenthrift.core.errors import ThriftError
from tokenthrift.models.attributing import (
    decompx_of,
    embedding_parts,
    globenc_of,
    head_of,
    label_parts,
    layers_of,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "text" / "globenc_decompx_tinybert.npz")
SLOPE = {"ZO": "zero_origin", "LA": "tangent"}
CASES = [name.split("_")[2:] for name in GOLDEN if name.startswith("decompx_GeLU")]


@cache
def bert():
    said = json.loads(str(GOLDEN["config"]))
    config = AutoConfig.for_model(
        "bert", vocab_size=30, hidden_size=said["hidden"], num_hidden_layers=said["layers"],
        num_attention_heads=said["heads"], intermediate_size=said["inter"], num_labels=said["labels"],
        max_position_embeddings=32, layer_norm_eps=said["eps"],
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.load_state_dict({k[2:]: torch.tensor(GOLDEN[k]) for k in GOLDEN if k.startswith("W:")})
    return model


INPUTS = {"input_ids": torch.tensor(GOLDEN["ids"]), "attention_mask": torch.tensor(GOLDEN["mask"])}
REAL = GOLDEN["mask"].astype(bool)


def test_globenc_equals_the_authors_code():
    got = globenc_of(bert(), INPUTS)
    np.testing.assert_allclose(got[0], GOLDEN["globenc"][0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[1], GOLDEN["globenc"][1], rtol=1e-5, atol=1e-6)
    assert not got[1, ~REAL[1]].any() and not got[1, REAL[1]][:, ~REAL[1]].any()


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_decompx_equals_the_authors_code(case):
    inner, share, head = case
    parts = decompx_of(bert(), INPUTS, share, SLOPE[inner])
    got = label_parts(bert(), parts, share, SLOPE[head])
    want = GOLDEN[f"decompx_GeLU_{inner}_{share}_{head}"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.sum(1), GOLDEN["logits"], atol=2e-6)


def test_the_parts_are_the_authors_and_sum_to_the_hidden_states():
    parts = decompx_of(bert(), INPUTS)
    np.testing.assert_allclose(parts[REAL], GOLDEN["decompx_vectors"][REAL], atol=2e-6)
    np.testing.assert_allclose(parts.sum(2)[REAL], GOLDEN["last_hidden"][REAL], atol=3e-6)
    assert not parts[1][REAL[1]][:, ~REAL[1]].any()


FAMILIES = {
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
    "electra": {"embedding_size": 12},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slope", ["zero_origin", "tangent"])
def test_attributions_sum_to_what_they_explain(family, slope):
    config = AutoConfig.for_model(
        family, vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=48, num_labels=2, **FAMILIES[family],
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    inputs = {"input_ids": torch.arange(5, 25).view(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    with torch.no_grad():
        logits, last = model(**inputs).logits, model.base_model(**inputs).last_hidden_state
    parts = decompx_of(model, inputs, "norm", slope)
    torch.testing.assert_close(parts.sum(2), last, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(label_parts(model, parts, "norm", slope).sum(1), logits, atol=2e-5, rtol=1e-4)
    length = embedding_parts(parts, inputs["attention_mask"]).sum(1)
    torch.testing.assert_close(length, torch.linalg.vector_norm(last.mean(1), dim=-1), atol=2e-5, rtol=1e-4)
    assert globenc_of(model, inputs).min() > 0


def test_models_that_cannot_be_taken_apart_are_refused():
    with pytest.raises(ThriftError, match="is no BERT-type encoder"):
        layers_of(SimpleNamespace(modules=list, config=None))
    plain = AutoModel.from_config(bert().config)
    assert head_of(plain) is None
    plain.classifier = torch.nn.Sequential()
    with pytest.raises(ThriftError, match="cannot be taken apart"):
        head_of(plain)
