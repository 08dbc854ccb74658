"""Kept entries equal kvpress 0.5.5's, through the public surface on its tiny Llama and on single layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tokenthrift as tt
from tokenthrift.models.cache_stage import cache_view

GOLDEN = Path(__file__).parents[1] / "golden" / "cache"


@pytest.fixture(scope="module")
def llama():
    data = np.load(GOLDEN / "kvpress_tiny_llama.npz")
    model = LlamaForCausalLM(LlamaConfig(**json.loads(str(data["config"])))).eval()
    weights = {k[2:]: torch.tensor(data[k]) for k in data.files if k.startswith("W:")}
    model.load_state_dict(weights)
    return model, data


@pytest.mark.parametrize("removed", [50, 80])
@pytest.mark.parametrize(
    ("press", "plan"),
    [
        ("knorm", "knorm(budget={})"),
        ("streaming", "streaming_llm(budget={}, sinks=4)"),
        ("snapkv", "snapkv(budget={}, window=8, kernel=5)"),
    ],
)
def test_kept_entries_equal_kvpress(llama, press, plan, removed):
    model, data = llama
    want = [data[f"{press}_{removed}/kept_{layer}"] for layer in range(2)]
    ids = torch.tensor(data["ids"])
    with tt.apply(plan.format(want[0].shape[-1]), model), torch.no_grad():
        out = model(ids)
    np.testing.assert_allclose(out.logits.numpy(), data["logits"], atol=2e-5)
    for layer, kept in enumerate(want):
        stored = out.past_key_values.layers[layer]
        np.testing.assert_array_equal(stored.positions.numpy(), np.sort(kept, axis=-1))
        index = stored.positions.unsqueeze(-1).expand(-1, -1, -1, stored.keys.shape[-1])
        for got, full in ((stored.keys, data[f"keys_{layer}"]), (stored.values, data[f"values_{layer}"])):
            torch.testing.assert_close(got, torch.tensor(full).gather(2, index), atol=2e-5, rtol=0)


def test_layer_scores_equal_kvpress():
    """SnapKV with another window, KNorm and StreamingLLM on one layer of 72 tokens, from its queries and keys."""
    inputs, scores = np.load(GOLDEN / "kvpress_layer_inputs.npz"), np.load(GOLDEN / "kvpress_scores.npz")
    keys, values = torch.tensor(inputs["keys"]), torch.tensor(inputs["values"])
    hidden, cos, sin = (torch.tensor(inputs[k]) for k in ("hidden_states", "cos", "sin"))
    batch, n, _ = hidden.shape
    queries = (hidden @ torch.tensor(inputs["q_proj_weight"]).T).view(batch, n, -1, keys.shape[-1]).transpose(1, 2)
    half = queries.shape[-1] // 2
    rotated = torch.cat([-queries[..., half:], queries[..., :half]], dim=-1)
    queries = queries * cos[:, None] + rotated * sin[:, None]
    view = cache_view(queries, keys, values, None, keys.shape[-1] ** -0.5, 0, 1)
    budget = int(n * (1 - 0.6))
    cases = {
        "snapkv": f"snapkv(budget={budget}, window=16, kernel=5)",
        "knorm": f"knorm(budget={budget})",
        "streaming": f"streaming_llm(budget={budget}, sinks=4)",
    }
    by_name = {k.lower(): k for k in scores.files if k.endswith("__kept")}
    for name, plan in cases.items():
        key = next(k for low, k in by_name.items() if low.startswith(name) and "eager" not in low)
        kept = tt.Plan.parse(plan).at("cache")[0].reduce(view).source
        np.testing.assert_array_equal(kept.numpy(), scores[key])
