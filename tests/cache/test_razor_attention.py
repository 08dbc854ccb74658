"""RazorAttention: what retrieval heads keep, what the others keep, and how heads are told apart."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import tokenthrift as tt
from cache.test_methods import left_padding, made_of, view
from tiny_models import prompt, tiny
from tokenthrift.cache.razor_attention import RazorAttention
from tokenthrift.models.kv import ReducedLayer
from tokenthrift.models.retrieval_heads import score_heads


def razor(**params):
    return tt.Plan(cache={"razor_attention": {"least": 0, **params}}).at("cache")[0]


def test_a_local_head_keeps_sinks_a_window_and_the_mean_of_the_rest():
    v = view(n=20)
    map = razor(budget=8, sinks=3, heads=[[0, 1]]).reduce(v)
    assert map.sizes()[0, 0].tolist() == [1, 1, 1, 13, 1, 1, 1, 1] + [0] * 12
    assert map.anchors[0, 0, :8].tolist() == [0, 1, 2, 3, 16, 17, 18, 19]
    for x in (v.keys, v.values):
        torch.testing.assert_close(map.apply(x)[0, 0, 3], x[0, 0, 3:16].mean(0))
        assert torch.equal(map.apply(x)[0, 0, 4:8], x[0, 0, 16:])
        assert torch.equal(map.apply(x)[0, 1], x[0, 1])
    assert map.sizes()[0, 1].tolist() == [1] * 20


def test_all_retrieval_heads_or_a_short_prompt_change_nothing():
    assert razor(budget=8, heads=[[0, 0], [0, 1]]).reduce(view()).is_identity
    assert not razor(budget=8, heads=[[1, 0], [1, 1]]).reduce(view()).is_identity
    assert razor(budget=20, heads=[]).reduce(view()).is_identity
    assert razor(budget=0.2, least=20, heads=[]).reduce(view()).is_identity
    assert razor(budget=0.2, least=10, sinks=2, heads=[]).reduce(view()).n_out == 10


def test_padding_is_no_sink_and_not_in_the_mean():
    v = view(n=20, batch=3)
    v = made_of(v.queries, v.keys, v.values, mask=left_padding(20, (6, 0, 15)))
    map = razor(budget=8, sinks=2, heads=[]).reduce(v)
    assert map.sizes()[:, 0].tolist() == [
        [1, 1, 7, 1, 1, 1, 1, 1],
        [1, 1, 13, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0, 0, 0],
    ]
    torch.testing.assert_close(map.apply(v.keys)[0, 0, 2], v.keys[0, 0, 8:15].mean(0))


def test_attention_over_what_is_stored_weighs_the_compensation_token():
    """N_d exp(q·k̂) in the softmax, written out."""
    v = view(n=20)
    map = razor(budget=8, sinks=3, heads=[[0, 1]]).reduce(v)
    stored = ReducedLayer(v.keys, v.values, map, v.mask, proportional=RazorAttention.proportional)
    q = v.queries[0, 0, -1]
    keys, values = stored.keys[0, 0, -8:], stored.values[0, 0, -8:]
    weight = torch.tensor([1.0, 1, 1, 13, 1, 1, 1, 1]) * (keys @ q * 8**-0.5).exp()
    mask = stored.bias.masked_fill(~stored.real, float("-inf"))[0, 0]
    out = scaled_dot_product_attention(q[None], stored.keys[0, 0], stored.values[0, 0], attn_mask=mask[None])
    torch.testing.assert_close(out[0], (weight / weight.sum()) @ values)


def test_drafts_over_compensation_tokens_give_the_tokens_of_plain_decoding():
    model, inputs = tiny("llama"), prompt(length=40, pad=6)
    inputs["input_ids"][:, 32:] = inputs["input_ids"][:, 31:39]
    cache = "cache=razor_attention(budget=12, least=0, heads=[[0, 1]])"
    with tt.apply(cache, model):
        plain = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    with tt.apply(cache + " decode=prompt_lookup(adaptive=False)", model) as session:
        assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False), plain)
    assert session.report().stages["decode"].extra["drafted"] > 0


# ---- which heads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_scores_are_attention_to_earlier_occurrences_and_what_followed(family):
    model = tiny(family, "eager")
    echo, induction, block = score_heads(model, block=50, repeats=3, seed=4)
    ids = torch.randint(97, (1, 50), generator=torch.Generator().manual_seed(4)).repeat(1, 3)
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    assert block == 50
    for layer, rows in enumerate(attentions):
        if family == "gemma3_text" and layer != 1:
            assert echo[layer] == induction[layer] == []
            continue
        want = [
            sum(rows[0, :, i, j + kind] for i in range(50, 150) for j in range(i - 50, -1, -50)) / 100
            for kind in (0, 1)
        ]
        for scores, w in zip((echo, induction), want, strict=True):
            torch.testing.assert_close(torch.tensor(scores[layer]), w.view(len(scores[layer]), -1).amax(-1))


def test_a_calibration_is_for_its_model_and_the_best_heads_retrieve(tmp_path):
    model, path = tiny("llama", num_hidden_layers=5), tmp_path / "heads.json"
    made = RazorAttention.calibrate(model, block=40)
    made.save(path)
    made.data["induction"] = [[0.1, 0.9], [0.2, 0.3], [0.8, 0.1], [0, 0], [0.4, 0.4]]
    made.data["echo"] = [[0, 0]] * 4 + [[0.1, 0]]
    made.save(path)
    plan = f"razor_attention(budget=8, least=0, induction=0.2, echo=0.1, heads={str(path)!r})"
    bound = tt.Plan.parse(plan).at("cache")[0].bind(model)
    assert bound.heads == [(0, 1), (2, 0), (4, 0)]
    with tt.apply(plan, model) as session, torch.no_grad():
        model(**prompt())
    sizes = [map.mask[0].sum(-1).tolist() for map in session.provenance()["cache"].values()]
    assert sizes == [[8, 40], [8, 8], [40, 8], [8, 8], [40, 8]]
    with tt.apply(plan, model.to(torch.bfloat16)):
        pass
    for other in (tiny("llama", num_hidden_layers=5, seed=1), tiny("llama")):
        with pytest.raises(tt.ThriftError, match=r"was made for .*tokenthrift calibrate razor_attention"):
            tt.apply(plan, other).install()


def test_without_a_calibration_the_command_is_named():
    with pytest.raises(tt.ThriftError, match=r"never calibrated .*'tokenthrift calibrate razor_attention --model"):
        tt.apply("razor_attention", tiny("llama")).install()


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "cannot read"), ("[]", "cannot read"), ('{"method": "fasa", "model": {}, "data": {}}', "of fasa, not of")],
)
def test_a_file_that_is_no_calibration_is_refused_when_the_plan_is_read(tmp_path, text, said):
    path = tmp_path / "heads.json"
    path.write_text(text)
    with pytest.raises(tt.ThriftError, match=said):
        tt.Plan.parse(f"razor_attention(heads={str(path)!r})")
    with pytest.raises(tt.ThriftError, match="No such file"):
        tt.Plan.parse("razor_attention(heads='nowhere.json')")


@pytest.mark.parametrize(
    "wrong",
    ["budget=5", "sinks=-1", "least=-1", "induction=1.5", "echo=-0.1", "heads=3", "heads=[1, 2]", "heads=[[0, -1]]"],
)
def test_impossible_parameters_are_refused_in_one_line(wrong):
    with pytest.raises(tt.ThriftError) as error:
        tt.Plan.parse(f"razor_attention({wrong})")
    assert "\n" not in str(error.value)


def test_heads_that_the_model_does_not_have_and_blocks_that_do_not_fit_are_refused():
    with pytest.raises(tt.ThriftError, match="2 layers of 2 key/value heads"):
        tt.apply("razor_attention(heads=[[0, 2]])", tiny("llama")).install()
    with pytest.raises(tt.ThriftError, match="cannot be read"):
        score_heads(tiny("llama"), block=300)
    assert score_heads(tiny("llama"))[2] == 128  # the model's 512 positions, four times


def test_the_shipped_calibration_is_that_of_the_default_model():
    from importlib.resources import files

    data = json.loads((files("tokenthrift") / "data/calibration/razor_attention-smollm2-135m.json").read_text())
    assert data["method"] == "razor_attention"
    assert (data["model"]["type"], data["model"]["layers"], data["model"]["kv_heads"]) == ("llama", 30, 3)
    assert [len(row) for row in data["data"]["induction"]] == [3] * 30
