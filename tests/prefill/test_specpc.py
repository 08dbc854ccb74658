"""SpecPC: the authors' scores and tokens; the target then behaves as if it had been given only these."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenthrift as tt
from tiny_models import FAMILIES, prompt, tiny
from tokenthrift.models.draft_attention import draft_attention
from tokenthrift.ops.attention import attention_rows

GOLDEN = Path(__file__).parents[1] / "golden" / "prefill"
SELECT = np.load(GOLDEN / "specpc_select.npz")
ATTENTION = np.load(GOLDEN / "specpc_attention.npz")


def specpc(**params):
    return tt.Plan(prefill={"specpc": {"model": "draft", **params}}).at("prefill")[0]


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, **{"max_new_tokens": 6, "do_sample": False, **kwargs})


def kept_prompts(session, inputs):
    map = session.provenance()["prefill"]
    return [ids[kept[real]][None] for ids, kept, real in zip(inputs["input_ids"], map.source, map.mask, strict=True)]


@pytest.mark.parametrize("case", range(5))
def test_tokens_equal_the_authors_code(case):
    capacity, kernel, neighbours, window, pool = SELECT[f"case{case}_cfg"].tolist()
    made = specpc(
        budget=capacity, kernel=kernel, neighbours=neighbours, window=window, pool=["none", "max", "mean"][pool]
    )
    got = made.choose(torch.tensor(SELECT["attn_per_key"][0]), capacity)
    np.testing.assert_array_equal(got, SELECT[f"case{case}_indices"][0])


def test_tokens_equal_the_authors_code_in_more_cases():
    scores = torch.tensor(ATTENTION["scores"][0])
    for meta in json.loads(str(ATTENTION["meta"])):
        made = specpc(
            budget=meta["capacity"],
            kernel=meta["kernel_size"],
            neighbours=meta["neighbor_tokens"],
            window=meta["window"],
            pool={None: "none", "max": "max", "avg": "mean"}[meta["pool"]],
        )
        np.testing.assert_array_equal(made.choose(scores, meta["capacity"]), ATTENTION[f"idx{meta['case']}"][0])


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_scores_equal_the_authors_code(reduction):
    """Of a prompt and one written token, from layer 2 on."""
    made = specpc(reduction=reduction)
    steps = [
        [made.of_layer(torch.tensor(layer)) for layer in SELECT[f"agg_{step}"][int(SELECT["agg_starting_layer"]) :]]
        for step in ("prefill", "decode")
    ]
    np.testing.assert_allclose(made.score(steps), SELECT[f"agg_{reduction}"], rtol=1e-5)


@pytest.mark.parametrize("name", json.loads(str(ATTENTION["agg_names"])))
def test_scores_from_queries_and_keys_equal_the_authors_code(name):
    _, reduction, weighted, start, lookahead = name.split("_")
    made, window, start = specpc(reduction=reduction, weighted=weighted == "1"), int(ATTENTION["win"]), int(start)
    queries, keys = (torch.tensor(ATTENTION[part]) for part in "QK")
    steps = [[attention_rows(q[:, :, -window:], k, 8**-0.5) for q, k in zip(queries, keys, strict=True)]]
    np.testing.assert_allclose(steps[0][0], ATTENTION["win_attn_l0"], atol=1e-6)
    steps += [[torch.tensor(layer) for layer in ATTENTION[f"dec{step}"]] for step in range(int(lookahead) - 1)]
    got = made.score([[made.of_layer(layer) for layer in layers[start:]] for layers in steps])
    np.testing.assert_allclose(got, ATTENTION[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("steps", [1, 3])
def test_attention_is_the_draft_models_own(family, steps):
    """Left padding; the tokens that it writes are those of generate."""
    draft, inputs = tiny(family, "eager", seed=3), prompt(length=30, pad=9)
    real = inputs["attention_mask"].bool()
    found = draft_attention(draft, inputs["input_ids"], real, 4, steps, 1, lambda a: a.sum((1, 2)))
    written = generate(draft, inputs, max_new_tokens=steps)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, steps - 1), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ids = written[:, : 30 + steps - 1]
    want = draft(ids, attention_mask=mask, position_ids=positions, output_attentions=True).attentions[1:2]
    assert [len(layers) for layers in found] == [len(want)] * steps
    for got, attention in zip(found[0], want, strict=True):
        torch.testing.assert_close(got, attention[:, :, 26:30, :30].sum((1, 2)), atol=1e-4, rtol=1e-4)
    for step in range(1, steps):
        for got, attention in zip(found[step], want, strict=True):
            torch.testing.assert_close(got, attention[:, :, 29 + step, : 30 + step].sum(1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_that_of_the_kept_tokens_alone(family):
    model, draft, inputs = tiny(family), tiny("llama", seed=5), prompt(length=40, pad=13)
    before = [dict(vars(m.config)) for m in (model, draft)]
    plan = tt.Plan(prefill={"specpc": {"model": draft, "budget": 12, "window": 4, "kernel": 3, "lookahead": 2}})
    with tt.apply(plan, model) as session:
        got = generate(model, inputs)
        rows = kept_prompts(session, inputs)
    assert [row.shape[1] for row in rows] == [12, 12]
    assert all(torch.equal(row[0, -4:], ids[-4:]) for row, ids in zip(rows, inputs["input_ids"], strict=True))
    want = torch.cat([generate(model, {"input_ids": row})[:, 12:] for row in rows])
    assert torch.equal(got[:, 40:], want)
    assert [dict(vars(m.config)) for m in (model, draft)] == before
    assert session.report().stages["prefill"].tokens_after == 24
    assert "<LlamaForCausalLM>" in str(plan)


def test_a_padded_row_keeps_what_it_keeps_alone():
    model, draft, inputs = tiny("llama"), tiny("llama", seed=5), prompt(length=40, pad=13)
    plan = tt.Plan(prefill={"specpc": {"model": draft, "budget": 12, "window": 4, "kernel": 4}})
    with tt.apply(plan, model) as session:
        out = generate(model, inputs)
        for row, pad in enumerate((13, 0)):
            alone = generate(model, {k: v[row : row + 1, pad:] for k, v in inputs.items()})
            assert torch.equal(out[row, pad:], alone[0])
    assert session.report().stages["prefill"].calls == 3


def test_keeping_everything_is_bit_identical_and_does_not_ask_the_draft_model():
    model, inputs = tiny("llama"), prompt(pad=5)
    want = model(**inputs).logits
    for budget in (1.0, 400):
        with tt.apply(tt.Plan(prefill={"specpc": {"model": tiny("llama"), "budget": budget}}), model):
            assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": 0},
        {"budget": 32},
        {"window": 0},
        {"kernel": 0},
        {"pool": "median"},
        {"reduction": "sum"},
        {"lookahead": 0},
        {"first_layer": -1},
        {"neighbours": -1},
        {"model": 3},
        {"model": ""},
    ],
)
def test_impossible_parameters_are_refused_in_one_line(wrong):
    with pytest.raises(tt.ThriftError) as error:
        specpc(**wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("draft", "params", "words"),
    [
        (lambda: tiny("llama", vocab_size=60), {}, "same tokenizer"),
        (lambda: tiny("llama"), {"first_layer": 9}, "has 2 layers"),
        (lambda: tiny("llama", max_position_embeddings=16), {}, "context is 16"),
        (lambda: torch.nn.Linear(2, 2), {}, "cannot draft"),
    ],
)
def test_draft_models_that_do_not_fit_are_refused(draft, params, words):
    model = tiny("llama")
    plan = tt.Plan(prefill={"specpc": {"model": draft(), "budget": 12, "window": 4, **params}})
    with pytest.raises(tt.ThriftError, match=words), tt.apply(plan, model):
        model(**prompt())
