"""GemFilter: the authors' tokens; the model then behaves as if it had been given only these."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenthrift as tt
from tiny_models import FAMILIES, prompt, tiny
from tokenthrift.models.decoder import find_attentions

GOLDEN = Path(__file__).parents[1] / "golden" / "prefill"
ALL = pytest.mark.parametrize("family", FAMILIES)
BOTH = pytest.mark.parametrize("attention", ["sdpa", "eager"])
PLAN = "prefill=gemfilter(budget=12, layer=1)"


def method(plan):
    return tt.Plan.parse(plan).at("prefill")[0]


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, **{"max_new_tokens": 6, "do_sample": False, **kwargs})


def kept_prompts(session, inputs):
    """The shorter prompt of each row, by the session's provenance."""
    map = session.provenance()["prefill"]
    return [ids[kept[real]][None] for ids, kept, real in zip(inputs["input_ids"], map.source, map.mask, strict=True)]


@pytest.mark.parametrize(("kernel", "name"), [(5, "pooled"), (1, "unpooled")])
def test_scores_and_tokens_equal_the_authors_code(kernel, name):
    data = np.load(GOLDEN / "gemfilter_select.npz")
    n = data["key"].shape[2]
    mask = torch.ones(1, n, dtype=torch.bool)
    view = tt.View(queries=torch.tensor(data["query"]), keys=torch.tensor(data["key"]), mask=mask)
    plan = f"gemfilter(budget={int(data['k'])}, kernel={kernel}, last={{}})"
    made, want = method(plan.format(False)), data[f"{name}_indices"]
    scores = np.sort(made.score(view)[0, want])[::-1]
    np.testing.assert_allclose(scores, data[f"{name}_values"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(made.reduce(view).source[0], np.sort(want))
    kept = method(plan.format(True)).reduce(view).source[0]
    assert set(want) - set(kept.tolist()) == {want[made.score(view)[0, want].argmin()]}  # gave way to the last
    assert kept[-1] == n - 1


@ALL
@BOTH
def test_generation_is_that_of_the_kept_tokens_alone(family, attention):
    """Row 0 is left-padded; later tokens have the positions of the shorter prompt."""
    model, inputs = tiny(family, attention), prompt(length=40, pad=13)
    with tt.apply(PLAN, model) as session:
        got = generate(model, inputs)
        rows = kept_prompts(session, inputs)
    assert [row.shape[1] for row in rows] == [12, 12]
    want = torch.cat([generate(model, {"input_ids": row})[:, 12:] for row in rows])
    assert torch.equal(got, torch.cat([inputs["input_ids"], want], 1))
    record = session.report().stages["prefill"]
    assert (record.calls, record.tokens_before, record.tokens_after) == (1, 67, 24)


def test_flops_are_those_of_the_first_layers_and_of_the_kept_tokens():
    model, inputs = tiny("llama", num_hidden_layers=8), prompt(length=40)
    with tt.apply("gemfilter(budget=10, layer=1)", model) as session:
        generate(model, inputs, max_new_tokens=1)
    costs = session.adapter.costs
    assert session.flops == 2 * (costs.flops(40, 40, 0) / 4 + costs.flops(10, 10, 1))
    assert session.flops_dense == 2 * costs.flops(40, 40, 1)
    with tt.apply("gemfilter(budget=10, layer=1)", model) as session:
        generate(model, inputs, max_new_tokens=2)
    assert session.flops == 2 * (costs.flops(40, 40, 0) / 4 + costs.flops(10, 10, 1) + costs.flops(1, 11))
    assert session.flops_dense == 2 * (costs.flops(40, 40, 1) + costs.flops(1, 41))


@ALL
def test_scores_are_those_of_the_models_own_queries_and_keys(family):
    model, inputs = tiny(family), prompt(length=40)
    seen = {}
    with tt.apply("cache=knorm(budget=1.0)", model) as session:  # watches the attention calls
        method_ = session.plan.at("cache")[0]

        def reduce(view):
            seen[view.layer] = (view.queries, view.keys)
            return method_.reduce(view)

        for module in find_attentions(model):
            from tokenthrift.models import attention

            attention._watchers[module].method = type("Spy", (), {"info": method_.info, "reduce": staticmethod(reduce)})
        model(**inputs)
    layer = 1
    queries, keys = seen[layer]
    mask = inputs["attention_mask"].bool()
    want = method("gemfilter(budget=12)").reduce(tt.View(queries=queries, keys=keys, mask=mask))
    with tt.apply(f"prefill=gemfilter(budget=12, layer={layer})", model) as session:
        model(**inputs)
    assert torch.equal(session.provenance()["prefill"].source, want.source)


@ALL
def test_keeping_everything_is_bit_identical_and_leaves_no_trace(family):
    model, inputs = tiny(family), prompt(pad=5)
    tokens, logits = generate(model, inputs, max_new_tokens=3), model(**inputs).logits
    before = sorted(vars(model)), model.config._attn_implementation
    for everything in ("gemfilter(budget=1.0)", "gemfilter(budget=400)"):
        with tt.apply(everything, model):
            assert torch.equal(generate(model, inputs, max_new_tokens=3), tokens)
            assert torch.equal(model(**inputs).logits, logits)
    with tt.apply(PLAN, model):
        assert not torch.equal(model(**inputs, logits_to_keep=1).logits, logits[:, -1:])
    with pytest.raises(RuntimeError, match="inside"), tt.apply(PLAN, model):
        raise RuntimeError("inside")
    assert (sorted(vars(model)), model.config._attn_implementation) == before
    assert torch.equal(model(**inputs).logits, logits)


def test_a_row_with_few_tokens_keeps_them_all_and_does_not_notice_the_others():
    model, inputs = tiny("llama"), prompt(length=40, pad=32)
    with tt.apply(PLAN, model) as session:
        got = generate(model, inputs)
    assert [row.shape[1] for row in kept_prompts(session, inputs)] == [8, 12]
    assert torch.equal(got[0, 32:], generate(model, {"input_ids": inputs["input_ids"][:1, 32:]})[0])
    with tt.apply(PLAN, model):
        alone = generate(model, {"input_ids": inputs["input_ids"][1:]})
    assert torch.equal(got[1:], alone)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_later_forwards_of_any_kind_go_on(family):
    """Without masks and positions, several tokens at once, a copied cache, beams and a second turn."""
    model, inputs = tiny(family), prompt(length=40)
    more = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(1))
    with tt.apply(PLAN, model) as session, torch.no_grad():
        first = model(inputs["input_ids"], use_cache=True, logits_to_keep=1)
        rows = torch.cat(kept_prompts(session, inputs))
        cache = copy.deepcopy(first.past_key_values)
        assert cache.get_seq_length() == 40
        one = model(more[:, :3], past_key_values=first.past_key_values).logits
        two = model(more[:, 3:], past_key_values=first.past_key_values).logits
        whole = model(more, past_key_values=cache).logits
        turn = generate(model, inputs, return_dict_in_generate=True)
        ids = torch.cat([turn.sequences, more], 1)
        second = generate(model, {"input_ids": ids, "past_key_values": turn.past_key_values})
        beams = generate(model, inputs, num_beams=3)
    want = model(torch.cat([rows, more], 1)).logits[:, 12:]
    torch.testing.assert_close(torch.cat([one, two], 1), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole, want, atol=1e-4, rtol=1e-4)
    assert torch.equal(beams[:, 40:], generate(model, {"input_ids": rows}, num_beams=3)[:, 12:])
    shorter = torch.cat([rows, ids[:, 40:]], 1)
    assert torch.equal(second[:, 40:], generate(model, {"input_ids": shorter})[:, 12:])


def test_the_cache_stage_acts_on_what_is_left():
    model, inputs = tiny("llama"), prompt(length=40, pad=13)
    with tt.apply(f"{PLAN} cache=snapkv(budget=6, window=2)", model) as session:
        got = generate(model, inputs)
        rows = kept_prompts(session, inputs)
    with tt.apply("cache=snapkv(budget=6, window=2)", model):
        want = torch.cat([generate(model, {"input_ids": row})[:, 12:] for row in rows])
    assert torch.equal(got[:, 40:], want)
    assert session.report().stages["cache"].tokens_before == 2 * 2 * 2 * 12


@pytest.mark.parametrize(
    "wrong", ["gemfilter(budget=0)", "gemfilter(budget=1.5)", "gemfilter(kernel=4)", "gemfilter(layer=-1)"]
)
def test_impossible_parameters_are_refused_in_one_line(wrong):
    with pytest.raises(tt.ThriftError) as error:
        tt.Plan.parse(wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("plan", "words"),
    [("gemfilter(layer=7)", "the model has 2 layers"), ("gemfilter() decode=prompt_lookup()", "leave out decode")],
)
def test_plans_that_cannot_run_are_refused(plan, words):
    model = tiny("llama")
    before = sorted(vars(model))
    with pytest.raises(tt.ThriftError, match=words), tt.apply(plan, model):
        pass
    assert sorted(vars(model)) == before


def test_a_static_cache_is_refused():
    model = tiny("llama")
    with pytest.raises(tt.ThriftError, match="StaticCache"), tt.apply(PLAN, model):
        generate(model, prompt(), cache_implementation="static")
