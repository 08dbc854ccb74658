"""SpecKV: the authors' choice of entries, and drafts that run behind the prompt and leave no trace."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

import tokenthrift as tt
from cache.test_methods import view
from tiny_models import prompt, tiny
from tokenthrift.cache.speckv import SpecKV
from tokenthrift.models.cache_stage import cache_view
from tokenthrift.models.kv import ReducedLayer
from tokenthrift.models.lookahead import Writer

GOLDEN = Path(__file__).parents[1] / "golden" / "cache"
OWN = "speckv(budget=12, window=4, lookahead=3, layers=1)"


@pytest.mark.parametrize("ahead", [0, 4, 8])
@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_kept_entries_equal_the_authors_code(ahead, reduction, pool):
    """Their window of 9 queries and capacity of 24 count drafted tokens; here these are beside window and budget.

    Max pooling leaves ties, which topk parts as it likes: there, the scores of what is kept.
    """
    data = np.load(GOLDEN / "speckv_compress.npz")
    queries, keys, values = (torch.tensor(data[k]) for k in ("queries", "keys", "values"))
    method = SpecKV(
        budget=24 - ahead, window=9 - ahead, kernel=int(data["kernel_size"]), reduction=reduction, pool=pool
    )
    v = cache_view(queries, keys, values, None, 8**-0.5, 0, 1, ahead=ahead)
    map, score = method.reduce(v), method.score(v)
    theirs = torch.tensor(data[f"{reduction}_{pool}_indices"][..., :15])
    theirs = torch.cat([theirs, torch.arange(55, 64 - ahead).expand(2, 2, -1)], -1)
    stored = torch.tensor(data[f"{reduction}_{pool}_keys"][:, :, : 24 - ahead])  # the last are those of the draft
    assert torch.equal(stored, keys.gather(2, theirs.unsqueeze(-1).expand(-1, -1, -1, 8)))
    if pool == "mean":
        assert torch.equal(map.source, theirs.sort(-1).values)
    kept, want = (score.gather(-1, index).sort(-1).values for index in (map.source, theirs))
    torch.testing.assert_close(kept, want)


def greedy(model, inputs, tokens):
    out = model.generate(
        **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, suppress_tokens=[], eos_token_id=None
    )
    return out[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("pad", [0, 7])
def test_a_draft_is_the_greedy_continuation(family, pad):
    model, inputs = tiny(family), prompt(length=30, pad=pad)
    want = greedy(model, inputs, 5)
    assert torch.equal(Writer("x", tiny(family), model).write(*inputs.values(), 5), want)
    assert torch.equal(Writer("x", model, layers=model.config.num_hidden_layers).write(*inputs.values(), 5), want)
    assert not torch.equal(Writer("x", model, layers=1).write(*inputs.values(), 5), want)


@pytest.mark.parametrize("pad", [0, 7])
def test_the_votes_are_those_of_prompt_and_draft_in_one_text(pad, monkeypatch):
    model, inputs, seen = tiny("llama", "eager"), prompt(length=30, pad=pad), {}
    draft = tiny("llama", seed=5)
    score = SpecKV.score
    monkeypatch.setattr(SpecKV, "score", lambda m, v: seen.update({v.layer: v.attention(7)}) or score(m, v))
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with tt.apply(tt.Plan(cache=SpecKV(budget=12, window=4, lookahead=3, draft=draft)), model), torch.no_grad():
        model(**inputs, position_ids=positions)
    ids = torch.cat([inputs["input_ids"], greedy(draft, inputs, 3)], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    with torch.no_grad():
        rows = model(
            ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), output_attentions=True
        ).attentions
    assert sorted(seen) == [0, 1]
    for layer, got in seen.items():
        torch.testing.assert_close(got, rows[layer][:, :, -7:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_draft_leaves_no_trace_but_the_choice(family, attention):
    model, inputs = tiny(family, attention), prompt(length=40)
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True)
        with tt.apply(OWN, model) as session:
            out = model(**inputs, output_hidden_states=True)
    torch.testing.assert_close(out.logits, plain.logits, atol=1e-4, rtol=1e-4)
    assert [h.shape for h in out.hidden_states] == [h.shape for h in plain.hidden_states]
    assert out.past_key_values.get_seq_length() == 40
    for layer, whole in zip(out.past_key_values.layers, plain.past_key_values.layers, strict=True):
        if isinstance(layer, DynamicSlidingWindowLayer):
            assert layer.cumulative_length == whole.cumulative_length == 40
            torch.testing.assert_close(layer.keys, whole.keys, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(layer.values, whole.values, atol=1e-5, rtol=1e-5)
        else:
            assert isinstance(layer, ReducedLayer) and layer.keys.shape[-2] == 12 and layer.seen == 40
            assert int(layer.positions.max()) == 39
    assert session.report().flops > session.report().flops_dense


def test_drafts_change_what_is_kept():
    v = view(n=40)
    near, far = (tt.Plan.parse("speckv(budget=12, window=2)").at("cache")[0].reduce(x).source for x in (v, ahead(v)))
    assert near.shape == far.shape == (1, 2, 12)
    assert not torch.equal(near, far)


def ahead(v):
    extra = torch.randn(3, 1, 4, 6, 8, generator=torch.Generator().manual_seed(9)) * 3
    parts = [torch.cat([x, e[:, : x.shape[1]]], 2) for x, e in zip((v.queries, v.keys, v.values), extra, strict=True)]
    return cache_view(*parts, None, 8**-0.5, 0, 1, ahead=6)


def test_nothing_is_drafted_where_all_is_kept_or_the_positions_end(monkeypatch):
    calls = []
    write = Writer.write
    monkeypatch.setattr(Writer, "write", lambda *args: calls.append(write(*args)) or calls[-1])
    model = tiny("llama", max_position_embeddings=42)
    with tt.apply("speckv(budget=64, window=4)", model), torch.no_grad():
        model(**prompt(length=40))
        assert not calls
    with tt.apply("speckv(budget=12, window=4)", model), torch.no_grad():
        cache = model(**prompt(length=40)).past_key_values
        assert calls[0].shape == (2, 2)
        model(prompt(length=2)["input_ids"], past_key_values=cache)
        assert len(calls) == 1
        model(**prompt(length=42))
        assert calls[1] is None


def test_drafts_of_the_decode_stage_go_on_from_it():
    model, inputs = tiny("llama"), prompt(length=40)
    inputs["input_ids"][:, 32:] = inputs["input_ids"][:, 31:39]
    with tt.apply(OWN, model):
        plain = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    with tt.apply(f"cache={OWN} decode=prompt_lookup(adaptive=False)", model) as session:
        assert torch.equal(model.generate(**inputs, max_new_tokens=16, do_sample=False), plain)
    assert session.report().stages["decode"].extra["drafted"] > 0


def test_generation_goes_on_and_the_model_is_as_before():
    model, inputs = tiny("llama"), prompt(length=40, pad=6)
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with tt.apply(OWN, model):
        assert model.generate(**inputs, max_new_tokens=8, do_sample=False).shape == (2, 48)
    with pytest.raises(tt.ThriftError, match="input_ids"), tt.apply(OWN, model):
        model(inputs_embeds=torch.randn(1, 20, 48))
    assert not model.model._forward_hooks and not model.model._forward_pre_hooks
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), plain)


def test_a_draft_model_is_printed_by_its_class_and_checked():
    model = tiny("llama")
    plan = tt.Plan(cache=SpecKV(draft=copy.deepcopy(model)))
    assert "draft=<LlamaForCausalLM>" in str(plan)
    with pytest.raises(tt.ThriftError, match="2,000 tokens and the target 97"):
        tt.apply(tt.Plan(cache=SpecKV(draft=tiny("llama", vocab_size=2000))), model).install()
    with pytest.raises(tt.ThriftError, match="cannot draft"):
        tt.apply(tt.Plan(cache=SpecKV(draft=model.model)), model).install()
    with pytest.raises(tt.ThriftError, match="LlamaForCausalLM has 2"):
        tt.apply("speckv(layers=3)", model).install()
    with pytest.raises(tt.ThriftError, match="nowhere"):
        tt.apply("speckv(draft=nowhere)", model).install()


@pytest.mark.parametrize(
    "wrong",
    ["budget=32", "kernel=4", "lookahead=-1", "reduction=sum", "pool=none", "layers=0", "draft=x, layers=2", "draft=3"],
)
def test_impossible_parameters_are_refused_in_one_line(wrong):
    with pytest.raises(tt.ThriftError) as error:
        tt.Plan.parse(f"speckv({wrong})")
    assert "\n" not in str(error.value)
