"""Selective attention: exact where everything is read, dense attention with a mask where it is not, no trace after."""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import tokenthrift as tt
from attention_plans import EACH, METHODS, plan
from tiny_models import fingerprint, generate, prompt, tiny
from tokenthrift.attention.quest import page_bounds
from tokenthrift.models.decoder import find_attentions
from tokenthrift.models.growing import GrowingLayer

FAMILIES = ("llama", "qwen2", "gemma3_text")
ALL = pytest.mark.parametrize("family", FAMILIES)
BOTH = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def model_of(family, attention="sdpa"):
    """Four layers; one of Gemma's has a sliding window."""
    types = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    return tiny(family, attention, num_hidden_layers=4, **({"layer_types": types} if "gemma" in family else {}))


@ALL
@BOTH
def test_reading_everything_is_bit_identical(family, attention):
    model, inputs = model_of(family, attention), prompt(pad=5)
    tokens, logits = generate(model, inputs, 8), model(**inputs).logits
    scores = generate(model, inputs, 8, output_logits=True, return_dict_in_generate=True).logits
    for everything in (plan(name, 400) for name in METHODS):
        with tt.apply(everything, model) as session:
            got = generate(model, inputs, 8, output_logits=True, return_dict_in_generate=True)
            assert torch.equal(got.sequences, tokens), everything
            assert all(map(torch.equal, got.logits, scores)), everything
            assert torch.equal(model(**inputs).logits, logits), everything
        assert session.report().stages["attention"].kept == 1


@ALL
@EACH
def test_no_trace_after_the_block_or_an_exception(family, name):
    model, inputs = model_of(family), prompt()
    before, tokens = fingerprint(model), generate(model, inputs)
    with tt.apply(plan(name, 12), model):
        generate(model, inputs)
    assert fingerprint(model) == before
    with pytest.raises(RuntimeError, match="inside"), tt.apply(plan(name, 12), model):
        raise RuntimeError("inside")
    assert fingerprint(model) == before
    assert torch.equal(generate(model, inputs), tokens)


@ALL
@BOTH
@EACH
@pytest.mark.parametrize("pad", [0, 7])
def test_selection_equals_dense_attention_that_masks_what_is_not_read(family, attention, name, pad, monkeypatch):
    """Other entries are read per layer, head and step; row 0 may be left-padded."""
    model, inputs = model_of(family, attention), prompt(length=40, pad=pad)
    n, more = 40, torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    read = []
    with tt.apply(plan(name, 12), model) as session, torch.no_grad():
        spy(monkeypatch, session.plan.at("attention")[0], read)
        got = teacher_forced(model, inputs, more)
    layers = [i for i in range(4) if not (family == "gemma3_text" and i == 1)]
    assert len(read) == 9 * len(layers)
    assert 0 < session.report().stages["attention"].kept < 0.9
    seen = {}
    for call, indices in enumerate(read):
        step, layer = divmod(call, len(layers))
        if indices is not None:
            chosen = torch.zeros(*indices.shape[:2], n + 9, dtype=torch.bool).scatter_(-1, indices, True)
            assert (chosen.sum(-1) == indices.shape[-1]).all(), "an entry is read twice"
            seen[layers[layer], n + step] = chosen
    full = torch.cat([inputs["input_ids"], more], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 9), value=1)
    with masked_attention(model, seen), torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        want = model(full, attention_mask=mask, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(got, want[:, n:], atol=2e-4, rtol=2e-4)


def spy(monkeypatch, method, read):
    select = type(method).select

    def noting(self, view):
        out = select(self, view)
        read.append(out)
        return out

    monkeypatch.setattr(type(method), "select", noting)


def teacher_forced(model, inputs, more, cache=None):
    """Logits of tokens fed one by one after a prompt."""
    mask, got = inputs["attention_mask"], []
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = model(**inputs, position_ids=positions, use_cache=True).past_key_values
    for i in range(more.shape[1]):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        positions = mask.sum(-1, keepdim=True) - 1
        out = model(more[:, i : i + 1], attention_mask=mask, position_ids=positions, past_key_values=cache)
        got.append(out.logits)
    return torch.cat(got, 1)


@contextmanager
def masked_attention(model, seen):
    """Dense attention in which query ``i`` of layer ``l`` sees of its past only ``seen[l, i]`` (batch, heads, n)."""
    base = model.config._attn_implementation

    def attention(module, q, k, v, mask, scaling=None, **kwargs):
        groups = q.shape[1] // k.shape[1]
        logits = q @ k.repeat_interleave(groups, 1).mT * scaling
        logits = logits + mask if mask is not None else logits
        for (layer, row), chosen in seen.items():
            if layer == module.layer_idx:
                hidden = ~chosen.repeat_interleave(q.shape[1] // chosen.shape[1], 1)
                logits[:, :, row] = logits[:, :, row].masked_fill(hidden, float("-inf"))
        out = logits.softmax(-1, dtype=torch.float32) @ v.repeat_interleave(groups, 1)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("masked_reference", attention)
    AttentionMaskInterface.register("masked_reference", eager_mask)
    configs = {id(m.config): m.config for m in find_attentions(model)}.values()
    try:
        for config in configs:
            config._attn_implementation_internal = "masked_reference"
        yield
    finally:
        for config in configs:
            config._attn_implementation_internal = base


@EACH
@pytest.mark.parametrize("pad", [16, 32])
def test_a_padded_row_generates_what_it_generates_alone(name, pad):
    model, inputs = model_of("llama"), prompt(length=40, pad=pad)
    with tt.apply(plan(name, 12), model):
        out = generate(model, inputs, 12)
        for row, padding in enumerate((pad, 0)):
            alone = generate(model, {k: v[row : row + 1, padding:] for k, v in inputs.items()}, 12)
            assert torch.equal(out[row, padding : padding + alone.shape[1]], alone[0])  # alone it may end earlier


def test_sliding_layers_are_left_alone_and_a_model_of_only_those_is_refused():
    model = model_of("gemma3_text")
    with tt.apply("quest(budget=8, page=4)", model), torch.no_grad():
        cache = model(**prompt(length=40)).past_key_values
    assert [isinstance(layer, GrowingLayer) for layer in cache.layers] == [True, False, True, True]
    with pytest.raises(tt.ThriftError, match="sliding window"), tt.apply("quest", tiny("mistral", sliding_window=16)):
        pass


@pytest.mark.parametrize("plan", ["cache=knorm() attention=quest()", "attention=quest() decode=prompt_lookup()"])
def test_stages_that_do_not_go_together_are_refused_in_one_line(plan):
    model = model_of("llama")
    before = fingerprint(model)
    with pytest.raises(tt.ThriftError, match="cannot be combined") as error, tt.apply(plan, model):
        pass
    assert "\n" not in str(error.value)
    assert fingerprint(model) == before


def test_a_cache_that_cannot_be_read_in_part_is_refused_by_name():
    model = model_of("llama")
    with (
        tt.apply("quest(budget=8, page=4)", model),
        pytest.raises(tt.ThriftError, match=r"layer 0 caches in a StaticLayer"),
    ):
        generate(model, prompt(), cache_implementation="static")


@EACH
def test_beam_search_a_second_turn_and_a_copied_prompt_work(name):
    model, inputs = model_of("llama"), prompt(length=30)
    want = model.generate(**inputs, max_new_tokens=6, num_beams=3)
    with tt.apply(plan(name, 300), model):
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, num_beams=3), want)
    with tt.apply(plan(name, 12), model):
        assert generate(model, inputs, num_beams=3).shape == (2, 36)
        first = generate(model, inputs, return_dict_in_generate=True)
        turn = torch.cat([first.sequences, inputs["input_ids"][:, :7]], 1)
        kept = deepcopy(first.past_key_values)
        answers = [
            model.generate(turn, past_key_values=cache, max_new_tokens=8, do_sample=False)
            for cache in (deepcopy(kept), kept)
        ]
    assert answers[0].shape == (2, 36 + 7 + 8)
    assert torch.equal(*answers)


def test_what_quest_remembers_follows_the_cache():
    """One token at a time, several at once, and after entries were taken back."""
    model, ids = model_of("llama"), prompt(length=80)["input_ids"]
    with tt.apply("quest(budget=12, page=4, dense=0)", model), torch.no_grad():
        cache = model(ids[:, :30]).past_key_values
        for fed in (1, 1, 1, 7, 1, -6, 1, 1, 1, 9, 1):
            if fed < 0:
                cache.crop(fed)
                continue
            at = cache.get_seq_length()
            model(ids[:, at : at + fed], past_key_values=cache)
            if fed == 1:
                whole = (at + 1) // 4 * 4
                for layer in cache.layers:
                    torch.testing.assert_close(
                        layer.memory["pages"].rows, page_bounds(layer.keys[:, :, :whole], 4), rtol=0, atol=0
                    )


def test_the_report_says_what_share_was_read_and_that_it_saves_compute():
    model, inputs = model_of("llama"), prompt(length=60)
    with tt.apply("quest(budget=16, page=4, dense=1)", model) as session:
        generate(model, inputs, 5)
    record = session.report().stages["attention"]
    steps = [61, 62, 63, 64]  # of a row; the prompt's own forward gives the first token
    dense = 2 * 2 * sum(steps)  # rows, heads
    read = 2 * 2 * sum(3 * 4 + (n - 1) % 4 + 1 for n in steps)
    assert record.calls == 16
    assert (record.tokens_before, record.tokens_after) == (4 * dense, dense + 3 * read)
    assert record.bytes_before == record.tokens_before * 2 * 8 * 4
    assert session.report().flops < session.report().flops_dense
    spared = (record.tokens_before - record.tokens_after) // 2  # per row: two key/value heads
    assert session.report().flops_dense - session.report().flops == 4 * 6 * 8 * spared


def test_padding_is_neither_counted_as_stored_nor_as_read():
    model, inputs = model_of("llama"), prompt(length=40, pad=30)
    with tt.apply("tidal_decode(budget=16, dense=0, reselect=2)", model) as session:
        generate(model, inputs, 2)
    record = session.report().stages["attention"]
    assert record.tokens_before == 4 * 2 * (11 + 41)
    assert record.tokens_after == 2 * 2 * (11 + 41) + 2 * 2 * (11 + 16)


def test_attention_that_is_more_than_a_softmax_is_refused():
    model = tiny("gemma2", "eager", num_hidden_layers=2, layer_types=["full_attention"] * 2, query_pre_attn_scalar=8)
    with tt.apply("quest(budget=8, page=4, dense=0)", model), pytest.raises(tt.ThriftError, match=r"layer 0.*softcap"):
        generate(model, prompt())
    with tt.apply("quest(budget=500)", model):
        assert torch.equal(generate(model, prompt()), model.generate(**prompt(), max_new_tokens=6, do_sample=False))


def test_a_cache_outlives_its_session():
    model, inputs = model_of("llama"), prompt(length=30)
    want = generate(model, inputs, 9)
    with tt.apply("quest(budget=500)", model):
        first = generate(model, inputs, 4, return_dict_in_generate=True)
    ids, mask = first.sequences, torch.ones_like(first.sequences)
    rest = model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=5)
    assert torch.equal(rest, want)
