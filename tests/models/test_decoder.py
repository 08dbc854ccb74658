"""Every decoder family: exact where nothing is reduced, right where entries are evicted, no trace afterwards."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import tokenthrift as tt
from cache_plans import EACH, EACH_EVICTING, MERGING, METHODS, plan
from tiny_models import FAMILIES, fingerprint, generate, prompt, tiny
from tokenthrift.models.decoder import find_attentions
from tokenthrift.models.kv import ReducedLayer

ALL = pytest.mark.parametrize("family", FAMILIES)
BOTH = pytest.mark.parametrize("attention", ["sdpa", "eager"])


@ALL
@BOTH
def test_keeping_everything_is_bit_identical(family, attention):
    model, inputs = tiny(family, attention), prompt(pad=5)
    tokens, logits = generate(model, inputs, 3), model(**inputs).logits
    for everything in (None, "knorm(budget=400)", *(plan(name, 1.0) for name in METHODS)):
        with tt.apply(everything, model):
            assert torch.equal(generate(model, inputs, 3), tokens), everything
            assert torch.equal(model(**inputs).logits, logits), everything


@ALL
@BOTH
def test_no_trace_after_the_block_or_an_exception(family, attention):
    model, inputs = tiny(family, attention), prompt()
    before, tokens = fingerprint(model), generate(model, inputs)
    with tt.apply("snapkv(budget=16, window=4)", model):
        generate(model, inputs)
    assert fingerprint(model) == before
    with pytest.raises(RuntimeError, match="inside"), tt.apply("knorm(budget=8)", model):
        find_attentions(model)[-1].register_forward_hook(boom := _Boom())
        try:
            generate(model, inputs)
        finally:
            boom.off(find_attentions(model)[-1])
    assert fingerprint(model) == before
    assert torch.equal(generate(model, inputs), tokens)


class _Boom:
    def __call__(self, *_):
        raise RuntimeError("inside")

    def off(self, module):
        for key in [k for k, v in module._forward_hooks.items() if v is self]:
            del module._forward_hooks[key]


@ALL
@BOTH
@pytest.mark.parametrize("step", [1, 5])
def test_eviction_equals_dense_attention_that_masks_what_was_evicted(family, attention, step):
    """Per layer and head different entries go; later tokens come one by one or five at once; row 0 is left-padded."""
    check_eviction(family, attention, step, "snapkv(budget=12, window=4)")


@ALL
@EACH_EVICTING
def test_every_method_evicts_right_on_every_family(family, name):
    check_eviction(family, "sdpa", 5, plan(name, 12))


@ALL
@BOTH
@pytest.mark.parametrize(
    "plan", [plan(name, 12) for name in MERGING] + [plan("razor_attention", 12)[:-3] + "[[0, 1]])"]
)
def test_merged_entries_are_attended_to_as_their_map_says(family, attention, plan):
    """Averaged keys and values; compensation tokens weigh as many as they stand for; heads of different lengths."""
    proportional = getattr(tt.Plan.parse(plan).at("cache")[0], "proportional", False)
    check_eviction(family, attention, 1 if attention == "sdpa" else 5, plan, merged=proportional)


def check_eviction(family, attention, step, plan, merged=None):
    model, inputs = tiny(family, attention), prompt(length=40, pad=7)
    more = torch.randint(3, 97, (2, 10), generator=torch.Generator().manual_seed(1))
    n = inputs["input_ids"].shape[1]
    with tt.apply(plan, model) as session, torch.no_grad():
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        cache = model(**inputs, position_ids=positions, use_cache=True).past_key_values
        kept = {i: stored_of(layer, n) for i, layer in enumerate(cache.layers) if isinstance(layer, ReducedLayer)}
        mask, got = inputs["attention_mask"], []
        for start in range(0, 10, step):
            mask = torch.nn.functional.pad(mask, (0, step), value=1)
            positions = (mask.cumsum(-1) - 1)[:, -step:].clamp(min=0)
            ids = more[:, start : start + step]
            out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            got.append(out.logits)
    assert kept
    assert session.report().stages["cache"].kept < (0.5 if merged is None else 0.9)
    full = {"input_ids": torch.cat([inputs["input_ids"], more], 1), "attention_mask": mask}
    maps = session.provenance()["cache"]
    assert merged is None or any((map.sizes() > 1).any() for map in maps.values())
    want = dense_reference(model, full, n, kept) if merged is None else merged_reference(model, full, n, maps, merged)
    torch.testing.assert_close(torch.cat(got, 1), want[:, n:], atol=2e-4, rtol=2e-4)


def stored_of(layer, n):
    """``(batch, kv_heads, n)`` bool: which of the ``n`` prompt tokens a reduced layer still holds."""
    real = torch.ones_like(layer.positions) if layer.real is None else layer.real.long()
    return torch.zeros(*real.shape[:2], n, dtype=torch.long).scatter_add_(-1, layer.positions, real) > 0


def dense_reference(model, inputs, n, kept):
    """One forward over everything, where queries from ``n`` on do not see the evicted prompt entries of their head."""

    def attention(module, q, k, v, mask, scaling=None, **kwargs):
        groups = q.shape[1] // k.shape[1]
        logits = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
        logits = logits + mask if mask is not None else logits
        if module.layer_idx in kept:
            hidden = ~kept[module.layer_idx].repeat_interleave(groups, 1)[:, :, None, :].expand(
                -1, -1, logits.shape[2] - n, -1
            )
            logits[:, :, n:, :n] = logits[:, :, n:, :n].masked_fill(hidden, float("-inf"))
        out = logits.softmax(-1, dtype=torch.float32) @ v.repeat_interleave(groups, 1)
        return out.transpose(1, 2).contiguous(), None

    return forward_with(attention, model, inputs)


def merged_reference(model, inputs, n, maps, proportional):
    """The same with maps that average: queries from ``n`` on see their outputs in place of the prompt."""

    def attention(module, q, k, v, mask, scaling=None, **kwargs):
        groups = q.shape[1] // k.shape[1]
        map = maps.get(module.layer_idx)
        logits = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
        weight = (logits + (0 if mask is None else mask)).softmax(-1)
        out = weight @ v.repeat_interleave(groups, 1)
        if map is not None:
            width = map.dense()
            keys, values = (torch.cat([width @ x[:, :, :n], x[:, :, n:]], 2) for x in (k, v))
            counts = map.sizes() if proportional else map.mask.float()
            counts = torch.nn.functional.pad(counts, (0, k.shape[2] - n), value=1.0)
            keys, values, counts = (x.repeat_interleave(groups, 1) for x in (keys, values, counts))
            late = torch.ones(k.shape[2] - n, keys.shape[2], dtype=torch.bool).tril(map.n_out)
            weight = (q[:, :, n:] @ keys.transpose(-1, -2) * scaling).exp() * counts[:, :, None] * late
            out[:, :, n:] = weight / weight.sum(-1, keepdim=True) @ values
        return out.transpose(1, 2).contiguous(), None

    return forward_with(attention, model, inputs)


def forward_with(attention, model, inputs):
    """The logits where this function answers all attention calls."""
    base = model.config._attn_implementation
    AttentionInterface.register("dense_reference", attention)
    AttentionMaskInterface.register("dense_reference", eager_mask)
    configs = {id(m.config): m.config for m in find_attentions(model)}.values()
    try:
        for config in configs:
            config._attn_implementation_internal = "dense_reference"
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            return model(**inputs, position_ids=positions, use_cache=False).logits
    finally:
        for config in configs:
            config._attn_implementation_internal = base


@EACH
def test_a_padded_row_generates_what_it_generates_alone(name):
    model, inputs = tiny("llama"), prompt(length=40, pad=13)
    with tt.apply(plan(name, 12), model):
        out = generate(model, inputs)
        for row, pad in enumerate((13, 0)):
            alone = generate(model, {k: v[row : row + 1, pad:] for k, v in inputs.items()})
            assert torch.equal(out[row, pad:], alone[0])


@pytest.mark.parametrize("pads", [(0, 0), (30, 0)])
def test_rows_with_few_real_tokens_keep_them_all(pads):
    """Row 0 has 10 real tokens under a budget of 16: it equals its own unpadded, uncompressed run."""
    model, inputs = tiny("llama"), prompt(length=40, pad=pads[0])
    with tt.apply("knorm(budget=16)", model) as session:
        out = generate(model, inputs)
    alone = {k: v[:1, pads[0] :] for k, v in inputs.items()}
    with tt.apply("knorm(budget=16)", model):
        want = generate(model, alone)
    assert torch.equal(out[0, 40:], want[0, 40 - pads[0] :])
    record = session.report().stages["cache"]
    assert record.tokens_before == 2 * 2 * (80 - pads[0])
    assert record.tokens_after == 2 * 2 * (16 + min(16, 40 - pads[0]))


def test_memory_is_freed_and_reported():
    model, inputs = tiny("llama"), prompt(length=200)
    with tt.apply("snapkv(budget=20, window=4)", model) as session, torch.no_grad():
        cache = model(**inputs).past_key_values
    stored = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
    record = session.report().stages["cache"]
    assert stored == record.bytes_after == record.bytes_before // 10
    assert record.bytes_before == session.adapter.costs.kv_bytes(200, 4, batch=2)


def test_sliding_layers_are_left_alone_and_a_model_of_only_those_is_refused():
    model = tiny("gemma3_text")
    with tt.apply("knorm(budget=8)", model) as session, torch.no_grad():
        cache = model(**prompt(length=40)).past_key_values
    assert [isinstance(layer, ReducedLayer) for layer in cache.layers] == [False, True, False]
    assert list(session.provenance()["cache"]) == [1]
    with pytest.raises(tt.ThriftError, match="sliding window"), tt.apply("knorm", tiny("mistral", sliding_window=16)):
        pass


def test_beam_search_and_a_second_turn_work():
    model, inputs = tiny("llama"), prompt(length=30)
    with tt.apply("knorm(budget=1.0)", model):
        assert torch.equal(
            generate(model, inputs, num_beams=3), model.generate(**inputs, max_new_tokens=6, num_beams=3)
        )
    with tt.apply("knorm(budget=10)", model):
        assert generate(model, inputs, num_beams=3).shape == (2, 36)
        first = generate(model, inputs, return_dict_in_generate=True)
        turn = torch.cat([first.sequences, inputs["input_ids"][:, :7]], 1)
        second = model.generate(turn, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False)
    assert second.shape == (2, 36 + 7 + 4)


@ALL
@BOTH
@pytest.mark.parametrize("pad", [0, 30])
def test_drafts_over_a_reduced_cache_give_the_tokens_of_plain_decoding(family, attention, pad):
    """Verification forwards of several tokens, and taking rejected ones back, on layers that hold few entries."""
    model, inputs = tiny(family, attention), prompt(length=40, pad=pad)
    inputs["input_ids"][:, 32:] = inputs["input_ids"][:, 31:39]  # something to copy
    with tt.apply("knorm(budget=16)", model):
        plain = generate(model, inputs, 24)
    with tt.apply("knorm(budget=16) decode=prompt_lookup(adaptive=False)", model) as session:
        assert torch.equal(generate(model, inputs, 24), plain)
    assert session.report().stages["decode"].extra["drafted"] > 0


def test_a_reset_cache_takes_a_new_prompt():
    model, first, second = tiny("llama"), prompt(length=30), prompt(length=50, seed=1)
    with tt.apply("knorm(budget=10)", model), torch.no_grad():
        cache = model(**first).past_key_values
        cache.reset()
        out = model(**second, past_key_values=cache)
        torch.testing.assert_close(out.logits, model(**second).logits)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [10, 10]
    assert cache.get_seq_length() == 50


def test_positions_are_those_of_the_text():
    model, inputs = tiny("llama"), prompt(length=30)
    with tt.apply("streaming_llm(budget=6, sinks=2)", model), torch.no_grad():
        cache = model(**inputs).past_key_values
        model(inputs["input_ids"][:, :3], past_key_values=cache)
        assert cache.layers[0].positions[1, 1].tolist() == [0, 1, 26, 27, 28, 29, 30, 31, 32]
        cache.crop(-2)
    assert cache.layers[1].positions[0, 0].tolist() == [0, 1, 26, 27, 28, 29, 30]
    assert cache.get_seq_length() == 31


def test_unsupported_caches_and_attention_say_what_to_do():
    model, inputs = tiny("llama"), prompt()
    with tt.apply("knorm(budget=8)", model), pytest.raises(tt.ThriftError, match="StaticLayer"):
        generate(model, inputs, cache_implementation="static")
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(tt.ThriftError, match="attn_implementation='sdpa'"), tt.apply("knorm(budget=8)", model):
        pass


def test_a_second_session_on_the_same_model_is_refused():
    model = tiny("llama")
    with tt.apply("knorm(budget=8)", model), pytest.raises(tt.ThriftError, match="another session"):
        tt.apply("knorm(budget=8)", model).install()


def test_only_what_the_method_needs_is_computed(monkeypatch):
    from tokenthrift.models import cache_stage

    def forbidden(*_):
        raise AssertionError("attention was computed although knorm does not read it")

    monkeypatch.setattr(cache_stage, "attention_rows", forbidden)
    model = tiny("llama")
    with tt.apply("knorm(budget=8)", model), torch.no_grad():
        model(**prompt())


@ALL
def test_flops_equal_the_counted_ones(family):
    """Prefill of 40 tokens and one step, dense and reduced, against torch's own counter (eager attention)."""
    model, inputs = tiny(family, "eager"), prompt(batch=1, length=40)
    with torch.no_grad(), tt.apply("knorm(budget=10)", model) as session, FlopCounterMode(display=False) as counted:
        cache = model(inputs["input_ids"]).past_key_values
        model(inputs["input_ids"][:, :1], past_key_values=cache)
    assert session.report().flops == pytest.approx(counted.get_total_flops(), rel=0.01)
    assert session.report().flops_dense > session.report().flops
