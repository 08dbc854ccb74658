"""TCA-Attention: which tokens of a block are core tokens, and what each head gets."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
import torch

import tokenthrift as tt
from cache.test_methods import left_padding, made_of, view
from models.test_decoder import check_eviction
from tiny_models import fingerprint, generate, prompt, tiny
from tokenthrift.cache.tca_attention import TCAAttention
from tokenthrift.models.head_budgets import score_budgets
from tokenthrift.models.kv import RaggedLayer

FLAT, STEEP = (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.75, 0.9, 0.95, 1.0)  # what heads hold that need much, and little
TWO = [[FLAT, STEEP], [STEEP, STEEP]]


def tca(**params):
    given = {"sinks": 2, "window": 4, "block": 4, "heads": "even", **params}
    return tt.Plan(cache={"tca_attention": given}).at("cache")[0]


def test_blocks_keep_powers_of_two_of_their_most_attended_tokens():
    """34 tokens: 2 sinks, 7 blocks of 4, the window of 4. 15 tokens in blocks: 2, 4, 4 and no other sizes but 1."""
    v = view(n=34)
    votes = v.attention(4).sum(-2).view(1, 2, 2, 34).mean(2)[0]
    map = tca(budget=6 + 13).reduce(v)
    for head in range(2):
        kept = map.kept[0, head]
        assert kept[:2].all() and kept[30:].all()
        blocks, worth = kept[2:30].view(7, 4), votes[head, 2:30].view(7, 4)
        assert sorted(blocks.sum(-1).tolist()) == [1, 1, 1, 2, 2, 2, 4]
        for chosen, w in zip(blocks, worth, strict=True):
            assert w[chosen].min() >= w.masked_fill(chosen, 0).max()
        by_mass = worth.sum(-1).argsort(descending=True)
        assert (blocks.sum(-1)[by_mass].diff() <= 0).all()


def test_smaller_budgets_keep_a_part_of_what_larger_ones_keep():
    v = view(n=50)
    for small, large in ((7, 8), (12, 13), (20, 40)):
        few, more = (tca(budget=budget).reduce(v).kept for budget in (small, large))
        assert (few <= more).all() and (few != more).any()


def test_heads_get_what_they_need_and_the_model_what_was_asked_for():
    counts = [
        tca(budget=16, heads=TWO).reduce(view(n=40, layer=layer, layers=2)).mask.sum(-1)[0].tolist() for layer in (0, 1)
    ]
    assert sum(counts[0] + counts[1]) == 4 * 16
    assert counts[0][0] > 2 * counts[0][1] and counts[1] == [counts[0][1]] * 2


def test_a_mass_gives_each_head_the_tokens_that_hold_it():
    def sizes(mass):
        return tca(mass=mass, heads=TWO).reduce(view(n=40)).mask.sum(-1)[0].tolist()

    assert sizes(0.75) == [30, 10]
    assert sizes(0.1) == [6, 6]  # sinks and window
    assert tca(mass=1.0, heads=TWO).reduce(view(n=40)).is_identity
    assert tca(mass=0.9, budget=3, heads=TWO).mass == 0.9  # the budget is not read


def test_rows_have_budgets_by_their_own_lengths():
    full = view(n=40, batch=2)
    parts = full.queries, full.keys, full.values
    for params in ({"mass": 0.6}, {"budget": 0.5}):
        map = tca(heads=TWO, **params).reduce(made_of(*parts, mask=left_padding(40, (14, 0))))
        for row, pad in enumerate((14, 0)):
            alone = tca(heads=TWO, **params).reduce(made_of(*(p[row : row + 1, :, pad:] for p in parts)))
            assert torch.equal(map.kept[row, :, pad:], alone.kept[0])
            assert not map.kept[row, :, :pad].any()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_generation_equals_dense_attention_without_what_was_evicted(family):
    heads = [[], [STEEP, FLAT], []] if family == "gemma3_text" else TWO
    check_eviction(family, "sdpa", 5, f"tca_attention(budget=14, sinks=2, window=4, block=4, heads={heads})")


def test_short_heads_take_less_memory_and_the_model_is_restored():
    model, inputs = tiny("llama"), prompt(length=64)
    before, tokens = fingerprint(model), generate(model, inputs)
    plan = f"tca_attention(mass=0.75, sinks=2, window=4, block=8, heads={TWO})"
    with tt.apply(plan, model), torch.no_grad():
        cache = model(**inputs).past_key_values
    assert isinstance(cache.layers[0], RaggedLayer)
    entry = 2 * 2 * 8 * 4  # rows, keys and values, channels, bytes
    assert [layer.nbytes for layer in cache.layers] == [(48 + 16) * entry, (16 + 16) * entry]
    with tt.apply(plan.replace("mass=0.75", "mass=1"), model):
        assert torch.equal(generate(model, inputs), tokens)
    assert fingerprint(model) == before


# ---- calibration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_figures_are_the_attention_that_is_not_lost(family):
    model = tiny(family, "eager")
    ids = prompt(batch=1, length=60)["input_ids"]
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    newest = lambda view: view.mask.cumsum(-1).expand(*view.keys.shape[:-1]).float()  # noqa: E731
    held = score_budgets(model, newest, ids=ids, queries=20, steps=8)
    for layer, rows in enumerate(attentions):
        if family == "gemma3_text" and layer != 1:
            assert held[layer] == []
            continue
        for head, figures in enumerate(held[layer]):
            group = rows[0].view(len(held[layer]), -1, 60, 60)[head]
            want = [1 - group[:, 40:, : 40 - 5 * step].sum(-1).mean() for step in range(9)]
            torch.testing.assert_close(torch.tensor(figures), torch.stack(want), atol=1e-5, rtol=0)


def test_a_calibration_is_made_saved_and_for_its_model(tmp_path):
    model, path = tiny("llama"), tmp_path / "heads.json"
    online = {"block": 4, "window": 4, "sinks": 2}
    before = fingerprint(model)
    made = TCAAttention.calibrate(model, tokens=60, queries=20, steps=8, **online)
    assert fingerprint(model) == before
    made.save(path)
    plan = f"tca_attention(budget=12, sinks=2, window=4, block=4, heads={str(path)!r})"
    bound = tt.Plan.parse(plan).at("cache")[0].bind(model)
    assert [[list(head) for head in layer] for layer in bound.heads] == made.data["held"]
    assert [len(layer) for layer in bound.heads] == [2, 2] and len(bound.heads[0][0]) == 9
    with tt.apply(plan, model) as session:
        generate(model, prompt())
    record = session.report().stages["cache"]
    assert record.tokens_after == 12 * 2 * 2 * 2
    with pytest.raises(tt.ThriftError, match=r"was made for .*tokenthrift calibrate tca_attention"):
        tt.apply(plan, tiny("llama", seed=1)).install()
    with pytest.raises(tt.ThriftError, match=r"never calibrated .*tokenthrift calibrate tca_attention --model"):
        tt.apply("tca_attention", model).install()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"queries": 0}, "at least 1"), ({"queries": 500}, "together at most"), ({"steps": 2.5}, "whole number as steps")],
)
def test_calibrations_that_cannot_be_measured_are_refused(options, said):
    with pytest.raises(tt.ThriftError, match=said):
        TCAAttention.calibrate(tiny("llama"), **{"tokens": 100, **options})


@pytest.mark.parametrize(
    "wrong",
    [
        "budget=0",
        "budget=36",
        "window=0",
        "sinks=-1",
        "block=1",
        "block=12",
        "spread=0",
        "spread=nan",
        "mass=0",
        "mass=1.5",
        "mass=0.9, heads=even",
        "heads=3",
        "heads=[]",
        "heads=[[[0.5, 0.4, 1]]]",
        "heads=[[[0.5, 0.6]]]",
        "heads=[[[0.5, 1], [0.2, 0.3, 1]]]",
        "heads='nowhere.json'",
    ],
)
def test_impossible_parameters_are_refused_in_one_line(wrong):
    with pytest.raises(tt.ThriftError) as error:
        tt.Plan.parse(f"tca_attention({wrong})")
    assert "\n" not in str(error.value)


def test_figures_for_other_heads_and_a_method_without_figures_are_refused():
    with pytest.raises(tt.ThriftError, match="do not fit layer 0"):
        tca(heads=[[FLAT] * 3]).reduce(view(n=600))
    with pytest.raises(tt.ThriftError, match="must know the heads"):
        tca(heads="auto").reduce(view())


def test_the_shipped_calibration_is_that_of_the_default_model():
    data = json.loads((files("tokenthrift") / "data/calibration/tca_attention-smollm2-135m.json").read_text())
    assert (data["model"]["type"], data["model"]["layers"], data["model"]["kv_heads"]) == ("llama", 30, 3)
    assert [len(layer) for layer in data["data"]["held"]] == [3] * 30
    bound = TCAAttention(heads=data["data"]["held"])  # its figures are figures
    assert (bound.block, bound.window, bound.sinks, bound.spread) == tuple(
        data["data"][name] for name in ("block", "window", "sinks", "spread")
    )
