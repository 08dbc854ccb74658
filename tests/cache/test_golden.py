"""Scores and kept entries equal kvpress 0.5.5's, through the public surface on its tiny Llama and on single layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import tokenthrift as tt
from tokenthrift.models.cache_stage import cache_view
from tokenthrift.ops.rotary import Rotary

GOLDEN = Path(__file__).parents[1] / "golden" / "cache"


def method(plan):
    return tt.Plan.parse(plan).at("cache")[0]


def assert_same_kept(name, ours, kept, score):
    """The same sets of positions. LagKV's scores tie between partitions: there, sets of equal scores."""
    ours, kept = np.sort(ours, axis=-1), np.sort(kept, axis=-1)
    if name == "lagkv":
        ours, kept = (np.sort(np.take_along_axis(score, index, -1), axis=-1) for index in (ours, kept))
    np.testing.assert_array_equal(ours, kept)


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
        ("tova", "tova(budget={})"),
        ("keydiff", "keydiff(budget={})"),
        ("pyramid", "pyramid_kv(budget={}, window=8, kernel=5, beta=4)"),
        ("lagkv", "lagkv(budget={}, sinks=4, lag=16)"),
        ("observed", "h2o(budget={}, recent=0, per_query=True)"),
        ("expected", "expected_attention(budget={}, sinks=4, future=32)"),
    ],
)
def test_kept_entries_equal_kvpress(llama, press, plan, removed):
    model, data = llama
    want = [data[f"{press}_{removed}/kept_{layer}"] for layer in range(2)]
    ids = torch.tensor(data["ids"])
    with tt.apply(plan.format(sum(w.shape[-1] for w in want) // 2), model), torch.no_grad():
        out = model(ids)
    np.testing.assert_allclose(out.logits.numpy(), data["logits"], atol=2e-5)
    for layer, kept in enumerate(want):
        stored = out.past_key_values.layers[layer]
        assert_same_kept(press, stored.positions.numpy(), kept, data[f"{press}_{removed}/score_{layer}"])
        index = stored.positions.unsqueeze(-1).expand(-1, -1, -1, stored.keys.shape[-1])
        for got, full in ((stored.keys, data[f"keys_{layer}"]), (stored.values, data[f"values_{layer}"])):
            torch.testing.assert_close(got, torch.tensor(full).gather(2, index), atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def layer():
    """The view of one layer of 72 tokens, from its hidden states and keys; and what kvpress made of it."""
    inputs, want = np.load(GOLDEN / "kvpress_layer_inputs.npz"), np.load(GOLDEN / "kvpress_scores.npz")
    keys, values = torch.tensor(inputs["keys"]), torch.tensor(inputs["values"])
    hidden, cos, sin = (torch.tensor(inputs[k]) for k in ("hidden_states", "cos", "sin"))
    batch, n, _ = hidden.shape
    queries = (hidden @ torch.tensor(inputs["q_proj_weight"]).T).view(batch, n, -1, keys.shape[-1]).transpose(1, 2)
    rotary = Rotary(cos, sin, lambda x, cos, sin: apply_rotary_pos_emb(x, x, cos, sin)[0])
    view = cache_view(rotary.apply(queries), keys, values, None, keys.shape[-1] ** -0.5, 0, 4, lambda: rotary)
    return view, want


@pytest.mark.parametrize(
    ("case", "plan"),
    [
        ("snapkv_w16_k5", "snapkv(budget={}, window=16, kernel=5)"),
        ("knorm", "knorm(budget={})"),
        ("streaming_s4", "streaming_llm(budget={}, sinks=4)"),
        ("tova", "tova(budget={})"),
        ("keydiff", "keydiff(budget={})"),
        ("pyramid_w8_k5_b20", "pyramid_kv(budget={}, window=8, kernel=5, beta=20)"),
        ("lagkv_s4_l16", "lagkv(budget={}, sinks=4, lag=16)"),
        ("h2o_observed", "h2o(budget={}, recent=0, per_query=True)"),
        ("expected_default", "expected_attention(budget={}, sinks=4, future=64)"),
        ("expected_nocov", "expected_attention(budget={}, future=64, covariance=False)"),
        ("expected_novnorm_eps", "expected_attention(budget={}, future=64, value_norm=False)"),
        ("expected_eps1e-2", "expected_attention(budget={}, future=64, epsilon=0.01)"),
    ],
)
def test_layer_scores_equal_kvpress(layer, case, plan):
    view, want = layer
    kept, score = want[f"{case}__kept"], want[f"{case}__scores"]
    reducer = method(plan.format(kept.shape[-1]))
    assert_same_kept(case.split("_")[0], reducer.reduce(view).source.numpy(), kept, score)
    if hasattr(reducer, "score"):
        ours = reducer.score(view).numpy()
        ours = np.floor(ours) / 16 if case.startswith("lagkv") else ours
        free = score < score.max()  # the highest value marks what the press forces in
        np.testing.assert_allclose(ours[free], score[free], atol=1e-5)


def test_pyramid_budgets_equal_kvpress():
    table = np.load(GOLDEN / "kvpress_scores.npz")["pyramid_budgets"]
    cases = {}
    for n, ratio, window, beta, _, budget in table.tolist():
        cases.setdefault((int(n), ratio, int(window), beta), []).append(int(budget))
    for (n, ratio, window, beta), want in cases.items():
        pyramid = method(f"pyramid_kv(budget={1 - ratio}, window={window}, beta={beta})")
        assert pyramid.budgets(n, 4) == want, (n, ratio, window, beta)


@pytest.fixture(scope="module")
def factory():
    """A layer's keys and values, and what the methods of KVCache-Factory (a head of scores for each key head) keep."""
    data = {k: torch.tensor(v) for k, v in np.load(GOLDEN / "kvcachefactory.npz").items()}
    queries, keys = data["queries"], data["keys"]

    def view(layer):
        return cache_view(queries, keys, data["values"], None, keys.shape[-1] ** -0.5, layer, 4)

    return view, data


def sorted_heads(x):
    """The entries of each head by their first channel: ours keep the order of the text, theirs that of the scores."""
    return torch.stack([head[head[:, 0].argsort()] for head in x.flatten(0, 1)])


@pytest.mark.parametrize(
    ("case", "plan"),
    [
        ("snapkv_mean_avgpool", "snapkv(budget=32, window=8)"),
        ("snapkv_max_avgpool", "snapkv(budget=32, window=8, group='max')"),
        ("snapkv_merge_pivot", "snapkv(budget=32, window=8, merge='pivot')"),
        ("snapkv_merge_weighted", "snapkv(budget=32, window=8, merge='weighted')"),
        ("h2o", "h2o(budget=32, recent=0.25)"),
        ("streaming", "streaming_llm(budget=28, sinks=4)"),
        ("l2norm", "knorm(budget=32)"),
    ],
)
def test_entries_equal_kvcache_factory(factory, case, plan):
    view, data = factory
    map = method(plan).reduce(view(0))
    for name in ("keys", "values") if "merge" in case else ("keys",):
        got, want = map.apply(data[name]), data[f"{case}_{name}"]
        torch.testing.assert_close(sorted_heads(got), sorted_heads(want), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("case", "plan", "group"),
    [
        ("snapkv_mean_maxpool", "snapkv(budget=32, window=8, pooling='max')", "mean"),
        ("snapkv_max_maxpool", "snapkv(budget=32, window=8, group='max', pooling='max')", "max"),
        *((f"pyramid_l{i}", "pyramid_kv(budget=32, window=8, pooling='max', apart=True)", "mean") for i in range(4)),
    ],
)
def test_entries_pooled_by_maximum_are_as_good_as_kvcache_factory_s(factory, case, plan, group):
    """Neighbours of a maximum tie, and sorting decides which of them stay: their scores are compared."""
    view, data = factory
    layer = int(case[-1]) if case.startswith("pyramid") else 0
    map, keys = method(plan).reduce(view(layer)), data["keys"]
    score = method(f"snapkv(budget=32, window=8, group='{group}', pooling='max')").score(view(layer))
    theirs = (data[f"{case}_keys"].unsqueeze(3) == keys.unsqueeze(2)).all(-1).int().argmax(-1)
    assert map.n_out == theirs.shape[-1]
    got, want = (score.gather(-1, index).sort(-1).values for index in (map.source, theirs))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("concentration", [False, True])
def test_head_lengths_of_ada_kv_equal_kvcache_factory(factory, concentration):
    view, data = factory
    base = "snapkv(window=8, kernel=7, pooling='max')"
    map = method(f'ada_kv(budget=32, base="{base}", safe="mix", concentration={concentration})').reduce(view(0))
    assert map.mask.sum(-1)[0].tolist() == data[f"adakv_norm{int(concentration)}_head_lens"].tolist()


def test_h2o_keeps_what_the_authors_code_keeps():
    """FMInference/H2O after a prefill of 24 tokens, 6 heavy hitters and the last 10."""
    data = np.load(GOLDEN / "h2o_layerwise.npz")
    n = int(data["prefill"])
    queries, keys, values = (torch.tensor(data[k])[:, :, :n] for k in ("queries", "keys", "values"))
    view = cache_view(queries, keys, values, None, keys.shape[-1] ** -0.5, 0, 1)
    h2o = method(f"h2o(budget=16, recent={10 / 16})")
    map = h2o.reduce(view)
    np.testing.assert_array_equal(map.apply(keys).numpy(), data["keys_after_prefill"])
    score = h2o.score(view).gather(-1, map.source)[0]
    np.testing.assert_allclose(score.numpy(), data["score_after_prefill"], atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1])
def test_spatten_keeps_what_the_authors_code_keeps(layer):
    """mit-han-lab/spatten-llm; its ``coming`` tokens take their room from the newest entries.

    It is given attention that is not causal, so the view is made of that and not of queries.
    """
    data = np.load(GOLDEN / "spatten_llm_cache.npz")
    start, recent, important, coming = (
        int(data[k]) for k in ("start_size", "recent_size", "important_size", "num_coming")
    )
    keys, values, attention = (torch.tensor(data[k][layer]) for k in ("keys", "values", "attn"))
    real = torch.ones(1, keys.shape[2], dtype=torch.bool)
    newest = recent - coming
    budget = start + important + newest
    spatten = method(f"spatten(budget={budget}, sinks={start}, recent={newest / budget})")
    map = spatten.reduce(tt.View(received=attention.sum(-2), mask=real))
    np.testing.assert_array_equal(map.apply(keys).numpy(), data["out_keys"][layer])
    np.testing.assert_array_equal(map.apply(values).numpy(), data["out_values"][layer])
    assert not map.source.equal(map.source[:, :1].expand_as(map.source))  # or heads would not choose for themselves


@pytest.mark.parametrize(("removed", "budget"), [(50, 32), (80, 12)])
def test_ada_kv_drops_what_kvpress_masks(llama, removed, budget):
    """There, what a head does not get is masked and stays in memory; here it is gone."""
    model, data = llama
    with tt.apply(f"ada_kv(budget={budget}, base='snapkv(window=8, kernel=5)')", model), torch.no_grad():
        cache = model(torch.tensor(data["ids"])).past_key_values
    for layer, stored in enumerate(cache.layers):
        want = np.ones((2, 2, 64), dtype=bool)
        want[tuple(data[f"adakv_snapkv_{removed}/masked_{layer}"])] = False
        np.testing.assert_array_equal(stored.map.kept.numpy(), want)
        assert stored.nbytes == want.sum() * 2 * 8 * 4


@pytest.mark.parametrize(("case", "base"), [("snapkv", "snapkv(window=16, kernel=5)"), ("knorm", "knorm")])
def test_ada_kv_selects_what_kvpress_selects(layer, case, base):
    view, want = layer
    pruned = want[f"adakv_{case}__pruned_mask"]
    map = method(f"ada_kv(budget={int((~pruned).sum()) // 4}, base='{base}')").reduce(view)
    np.testing.assert_array_equal(map.kept.numpy(), ~pruned)
