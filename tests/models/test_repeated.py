"""Caches that are reduced again and again while the text grows."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import eager_mask

import tokenthrift as tt
from cache_plans import MERGING, METHODS
from cache_plans import plan as plan_of
from tiny_models import prompt, tiny
from tokenthrift.core.session import StageRecord
from tokenthrift.models.cache_stage import CacheWatcher
from tokenthrift.models.decoder import find_attentions
from tokenthrift.models.kv import RaggedLayer, ReducedLayer
from tokenthrift.ops import growing
from tokenthrift.ops.growing import ROOM

GOLDEN = Path(__file__).parents[1] / "golden" / "cache"
REPEATED = [info.name for info in tt.methods(stage="cache") if "every" in info.defaults]
EACH = pytest.mark.parametrize("name", REPEATED)
EACH_EVICTING = pytest.mark.parametrize("name", [name for name in REPEATED if name not in MERGING])
SPREADING = {"ada_kv", "pyramid_kv"}
"""Their budget is a mean, over the heads of a layer or over the layers."""


def plan(name, budget, every):
    return plan_of(name, budget)[:-1] + f", every={every})"


def test_the_methods_of_the_papers_that_decode_are_here():
    assert {"streaming_llm", "knorm", "keydiff", "lagkv", "snapkv", "tova", "h2o", "tree_kv"} <= set(REPEATED)
    assert {"ada_kv", "pyramid_kv", "expected_attention", "ems", "razor_attention"} <= set(REPEATED)


# ---- what later tokens see -------------------------------------------------------------------------------------------


def visible(layer, n):
    """``(batch, kv_heads, n)`` bool: which of the ``n`` tokens so far a layer holds."""
    real = torch.ones_like(layer.positions) if layer.real is None else layer.real.long()
    return torch.zeros(*real.shape[:2], n, dtype=torch.long).scatter_add_(-1, layer.positions, real) > 0


def run(model, inputs, more, cuts, **apply):
    """Logits of the prompt and what follows, fed in pieces; and of every layer what each query could see."""
    ids = torch.cat([inputs["input_ids"], more], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, more.shape[1]), value=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, logits, total = DynamicCache(config=model.config), [], ids.shape[1]
    seen, sizes = {}, []
    start = 0
    for end in cuts:
        held = {i: visible(layer, start) for i, layer in enumerate(cache.layers) if isinstance(layer, ReducedLayer)}
        piece = {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, start:end],
        }
        logits.append(model(**piece, past_key_values=cache, use_cache=True).logits)
        for i, layer in enumerate(cache.layers):
            if isinstance(layer, ReducedLayer):
                rows = seen.setdefault(i, torch.zeros(len(ids), layer.map.lead[1], total, total, dtype=torch.bool))
                rows[:, :, start:end, :start] = held.get(i, torch.zeros(0)).unsqueeze(2) if start else False
                own = torch.ones(end - start, end - start).tril().bool() & mask[:, None, None, start:end].bool()
                rows[:, :, start:end, start:end] = own
        sizes.append([layer.stored for layer in cache.layers if isinstance(layer, ReducedLayer)])
        start = end
    return torch.cat(logits, 1), seen, sizes, cache


def dense(model, inputs, more, seen):
    """One forward over everything in which each query sees what it saw then."""
    base = model.config._attn_implementation

    def attention(module, q, k, v, mask, scaling=None, **kwargs):
        groups = q.shape[1] // k.shape[1]
        logits = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
        logits = logits + mask if mask is not None else logits
        if module.layer_idx in seen:
            logits = logits.masked_fill(~seen[module.layer_idx].repeat_interleave(groups, 1), -1e30)
        return (logits.softmax(-1) @ v.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None

    AttentionInterface.register("dense_reference", attention)
    AttentionMaskInterface.register("dense_reference", eager_mask)
    configs = {id(m.config): m.config for m in find_attentions(model)}.values()
    try:
        for config in configs:
            config._attn_implementation_internal = "dense_reference"
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, more.shape[1]), value=1)
        ids = torch.cat([inputs["input_ids"], more], 1)
        return model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=False).logits
    finally:
        for config in configs:
            config._attn_implementation_internal = base


def later(n):
    return torch.randint(3, 97, (2, n), generator=torch.Generator().manual_seed(1))


def check(family, plan, cuts, pad, attention="sdpa"):
    model, inputs, more = tiny(family, attention), prompt(length=30, pad=pad), later(cuts[-1] - 30)
    with torch.no_grad():
        with tt.apply(plan, model):
            got, seen, sizes, cache = run(model, inputs, more, cuts)
        want = dense(model, inputs, more, seen)
    real = torch.nn.functional.pad(inputs["attention_mask"], (0, more.shape[1]), value=1).bool()
    torch.testing.assert_close(got[real], want[real], atol=2e-4, rtol=2e-4)
    return sizes, cache


@EACH_EVICTING
def test_each_method_equals_dense_attention_with_what_it_evicts(name):
    """Row 0 is padded and shorter than the budget at first; six reductions of four tokens each."""
    sizes, cache = check("llama", plan(name, 12, 4), [30, *range(31, 53)], pad=22)
    assert sum(layer.entries for layer in cache.layers) == 2 * 2 * 2 * 14
    if name not in SPREADING:
        assert max(map(max, sizes)) == 15 and sizes[-1] == [14, 14]
    assert all(layer.seen == 52 and layer.fresh == 2 for layer in cache.layers)
    assert all(layer.came.tolist() == [30, 52] for layer in cache.layers)


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_families_equal_dense_attention_with_what_is_evicted(family, attention):
    check(family, "snapkv(budget=10, window=4, every=3)", [30, *range(31, 55)], pad=7, attention=attention)


@pytest.mark.parametrize("name", ["knorm", "snapkv", "h2o", "expected_attention", "ada_kv", "pyramid_kv"])
@pytest.mark.parametrize("pad", [0, 13])
def test_a_prompt_in_chunks_equals_dense_attention_with_what_is_evicted(name, pad):
    """With 13 padding tokens, the first chunk of row 0 has none but these."""
    sizes, cache = check("llama", plan(name, 12, 4), [10, 20, 30, 36, *range(37, 55)], pad)
    assert max(map(max, sizes)) <= 12 + 3 or name in SPREADING
    assert sum(layer.entries for layer in cache.layers) <= 2 * 2 * 2 * (12 + 3)


def test_a_short_prompt_grows_to_its_budget_untouched():
    model, inputs = tiny("llama"), prompt(length=6)
    full = model.generate(**inputs, max_new_tokens=20, do_sample=False, min_new_tokens=20)
    for name in REPEATED:
        with tt.apply(plan(name, 40, 3), model):
            out = model.generate(**inputs, max_new_tokens=20, do_sample=False, min_new_tokens=20)
        assert torch.equal(out, full), name


def test_a_prompt_of_one_token_is_followed_from_the_start():
    model = tiny("llama")
    with tt.apply("h2o(budget=8, every=1)", model), torch.no_grad():
        cache = model(torch.tensor([[5]])).past_key_values
        for t in range(20):
            model(torch.tensor([[t + 3]]), past_key_values=cache)
    assert [layer.stored for layer in cache.layers] == [8, 8]
    assert (cache.layers[0].received.sum(-1) <= 21).all() and (cache.layers[0].positions[..., 0] == 0).all()


def test_sums_of_attention_follow_the_entries():
    """What is counted equals the attention computed anew over what each query saw."""
    model, inputs, more = tiny("llama", num_hidden_layers=1), prompt(length=20, pad=3), later(12)
    with torch.no_grad(), tt.apply("h2o(budget=9, every=4)", model):
        _, seen, _, cache = run(model, inputs, more, [20, *range(21, 33)])
    layer, caught = cache.layers[0], {}

    def attention(module, q, k, v, mask, scaling=None, **kwargs):
        logits = q @ k.repeat_interleave(3, 1).transpose(-1, -2) * scaling
        hidden = ~seen[0].repeat_interleave(3, 1)
        rows = logits.masked_fill(hidden, -1e30).softmax(-1) * ~hidden
        caught["received"] = rows.sum(-2).unflatten(1, (2, 3)).mean(2)
        return v.repeat_interleave(3, 1).transpose(1, 2), None

    AttentionInterface.register("dense_reference", attention)
    AttentionMaskInterface.register("dense_reference", eager_mask)
    model.config._attn_implementation_internal = "dense_reference"
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 12), value=1)
    with torch.no_grad():
        model(torch.cat([inputs["input_ids"], more], 1), position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    want = caught["received"].gather(-1, layer.positions)
    torch.testing.assert_close(layer.received, want, atol=1e-5, rtol=1e-5)


# ---- the authors' code -----------------------------------------------------------------------------------------------


def decode_alone(plan, queries, keys, prefill):
    """The keys of one layer after the prompt and after every token, without a model."""
    session = SimpleNamespace(record=lambda *_, **__: StageRecord(), add_map=lambda *_: None)
    method = tt.Plan.parse(plan).at("cache")[0]
    module, cache = torch.nn.Module(), DynamicCache()
    module.layer_idx, module.config = 0, SimpleNamespace(_attn_implementation="sdpa")
    watcher = CacheWatcher(module, 1, method, session)
    cuts = [0, prefill, *range(prefill + 1, keys.shape[-2] + 1)]
    for start, end in pairwise(cuts):
        query, new = queries[:, :, start:end], keys[:, :, start:end]
        watcher.note_call((), {"past_key_values": cache})
        key, value = cache.update(new, new, 0)
        watcher.before(query, key, None)
        watcher.after(query, key, value, None, keys.shape[-1] ** -0.5)
        yield cache.layers[0]


def test_h2o_decodes_like_the_authors_code():
    """FMInference/H2O: 6 heavy hitters and the last 10 of 24 tokens, then 8 more, each of which evicts one."""
    data = np.load(GOLDEN / "h2o_layerwise.npz")
    queries, keys = torch.tensor(data["queries"]), torch.tensor(data["keys"])
    steps = decode_alone(f"h2o(budget=16, recent={10 / 16}, every=1)", queries, keys, int(data["prefill"]))
    for layer, name in zip(steps, ["prefill", *(f"step{i}" for i in range(8))], strict=True):
        np.testing.assert_array_equal(layer.keys.numpy(), data[f"keys_after_{name}"])
        np.testing.assert_allclose(layer.received[0].numpy(), data[f"score_after_{name}"], atol=1e-5)


def test_tova_decodes_like_the_authors_code():
    """schwartz-lab-NLP/TOVA: 12 of 24 tokens, then 10 more, one of which is dropped as soon as it comes."""
    data = np.load(GOLDEN / "tova_decode.npz")
    queries, keys = torch.tensor(data["queries"]), torch.tensor(data["keys"])
    steps = decode_alone("tova(budget=12, keep_last=False, every=1)", queries, keys, int(data["prefill"]))
    dropped = 0
    for i, layer in enumerate(steps):
        np.testing.assert_array_equal(
            layer.keys.numpy(), data[f"keys_after_step{i - 1}" if i else "keys_after_prefill"]
        )
        dropped += int(layer.positions.max()) < layer.seen - 1
    assert dropped == 1


def test_tree_kv_decodes_as_its_algorithm_says():
    """Against the algorithm in words: a pair of neighbours at a place that moves on, sinks and the newest left out."""
    g = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(1, 2, 60, 4, generator=g), torch.randn(1, 1, 60, 4, generator=g)
    sinks, newest, room, n = 2, 4, 6, 12
    place, kept = 0, list(range(n))
    total, times = torch.zeros(60), torch.zeros(60)
    for t in range(60):
        kept = kept if t < n else [*kept, t]
        at = [i for i in kept if i <= t]
        weights = (queries[0, :, t] @ keys[0, 0, at].T / 2).softmax(-1).mean(0)
        total[at] += weights
        times[at] += 1
        if len(kept) > n:
            one, other = kept[sinks + place], kept[sinks + place + 1]
            mean = total / times
            kept.remove(other if mean[one] > mean[other] else one)
            place = (place + 1) % room
    *_, layer = decode_alone("tree_kv(budget=12, sinks=2, recent=0.5, every=1)", queries, keys, n)
    assert layer.positions[0, 0].tolist() == kept
    assert kept[:sinks] == [0, 1] and kept[-newest:] == [56, 57, 58, 59]


# ---- memory, positions, reports --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["streaming_llm", "knorm", "snapkv", "h2o"])
def test_bytes_stay_flat_and_positions_true_over_a_long_text(name):
    model, inputs = tiny("llama"), prompt(length=30, pad=5)
    with tt.apply(plan(name, 16, 8), model) as session:
        held = []
        for module in find_attentions(model):
            module.register_forward_hook(
                lambda m, a, k, out: held.append(k["past_key_values"].layers[m.layer_idx]), with_kwargs=True
            )
        out = model.generate(
            **inputs, max_new_tokens=120, min_new_tokens=120, do_sample=False, return_dict_in_generate=True
        )
        for module in find_attentions(model):
            module._forward_hooks.clear()
    layer = out.past_key_values.layers[0]
    assert max(h.stored for h in held) < 16 + 8
    assert layer.get_seq_length() == 30 + 119
    assert (layer.positions.diff(dim=-1) > 0).all() and (layer.positions[..., -1] == 148).all()
    record = session.report().stages["cache"]
    per_entry = 2 * 2 * 2 * 8 * 4  # keys and values, rows, heads, channels, bytes
    assert layer.nbytes == record.extra["most_bytes_a_layer"] == (16 + 8) * per_entry
    assert record.extra["then_dropped"] == 14 * 8 * 2 * 2 * 2
    kept = session.provenance()["cache"][0]
    assert kept.n_in == 30 + 8 * 14 and torch.equal(kept.positions("anchor")[..., :16], layer.positions[..., :16])


def test_generate_reads_a_prompt_in_chunks_within_the_budget():
    model, inputs = tiny("llama"), prompt(length=100, pad=33)
    with tt.apply("snapkv(budget=20, window=4, every=8)", model):
        peak = []
        for module in find_attentions(model):
            module.register_forward_hook(
                lambda m, a, k, out: peak.append(k["past_key_values"].layers[m.layer_idx].stored), with_kwargs=True
            )
        out = model.generate(**inputs, max_new_tokens=30, do_sample=False, prefill_chunk_size=16)
        for module in find_attentions(model):
            module._forward_hooks.clear()
    assert max(peak) <= 20 + 8 and out.shape == (2, 130)


@EACH
def test_a_padded_row_generates_what_it_generates_alone(name):
    model, inputs = tiny("llama"), prompt(length=40, pad=16)
    more = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with tt.apply(plan(name, 12, 4), model):
        out = model.generate(**inputs, **more)
        alone = model.generate(**{k: v[:1, 16:] for k, v in inputs.items()}, **more)
    assert torch.equal(out[0, 16:], alone[0])


def test_beams_keep_their_own_entries():
    model, inputs = tiny("llama"), prompt(length=30)
    with torch.no_grad(), tt.apply("h2o(budget=12, every=2)", model):
        beams = model.generate(**inputs, max_new_tokens=10, num_beams=3, do_sample=False)
        cache = model(**inputs).past_key_values
        one, other = (copy.deepcopy(cache) for _ in range(2))
        rows = torch.tensor([1, 0, 1])
        one.reorder_cache(rows)
        for t in range(5):
            ids = torch.tensor([[3 + t], [40 + t], [50 + t]])
            got = model(ids, past_key_values=one).logits
        other.batch_select_indices(rows[:2])
        for t in range(5):
            ids = torch.tensor([[3 + t], [40 + t]])
            want = model(ids, past_key_values=other).logits
    assert beams.shape == (2, 40)
    torch.testing.assert_close(got[:2], want)


# ---- one cache, many questions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        "snapkv(budget=16, window=4)",
        "ada_kv(budget=16, base=knorm)",
        "knorm(budget=16, every=4)",
        "h2o(budget=16, every=4)",
    ],
)
def test_a_compressed_prompt_answers_many_questions(plan):
    model, inputs = tiny("llama"), prompt(length=40, pad=6)
    more = {"max_new_tokens": 6, "do_sample": False}
    with tt.apply(plan, model), torch.no_grad():
        cache = model(**inputs).past_key_values
        before = [layer.keys.clone() for layer in cache.layers]
        answers = []
        for seed in (1, 2, 1):
            ask = prompt(length=5, seed=seed)
            both = {k: torch.cat([inputs[k], ask[k]], 1) for k in inputs}
            answers.append(model.generate(**both, past_key_values=copy.deepcopy(cache), **more))
        assert torch.equal(answers[0], answers[2]) and not torch.equal(answers[0], answers[1])
        # The last answer by hand, token by token.
        mask, tokens, mine = inputs["attention_mask"], ask["input_ids"], copy.deepcopy(cache)
        for _ in range(6):
            mask = torch.nn.functional.pad(mask, (0, tokens.shape[1]), value=1)
            positions = (mask.cumsum(-1) - 1)[:, -tokens.shape[1] :]
            logits = model(tokens, attention_mask=mask, position_ids=positions, past_key_values=mine).logits
            tokens = logits[:, -1:].argmax(-1)
        assert torch.equal(answers[2][:, -1:], tokens)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pad", [0, 9])
def test_heads_that_share_keys_read_them_together_where_nothing_is_hidden(attention, pad, monkeypatch):
    """Not under eager attention, which may have to show its weights; nor where a row has padding."""
    model, inputs, calls = tiny("llama", attention=attention), prompt(length=30, pad=pad), []
    attend = ReducedLayer.attend

    def noted(self, query, scaling):
        calls.append(query.shape)
        return attend(self, query, scaling)

    def logits():
        with tt.apply("streaming_llm(budget=24, sinks=4)", model), torch.no_grad():
            cache = model(**inputs).past_key_values
            return torch.cat([model(inputs["input_ids"][:, i : i + 1], past_key_values=cache).logits for i in range(3)])

    monkeypatch.setattr(ReducedLayer, "attend", noted)
    together = logits()
    assert calls == ([(2, 6, 1, 8)] * 6 if attention == "sdpa" and pad == 0 else [])
    monkeypatch.setattr(ReducedLayer, "shared", lambda *_: False)
    torch.testing.assert_close(together, logits(), atol=1e-4, rtol=1e-4)


# ---- heads of different lengths --------------------------------------------------------------------------------------


RAGGED = ["ada_kv(budget=12, base='snapkv(window=4)')", "ada_kv(budget=12, base=knorm, safeguard=0)"]


@pytest.mark.parametrize("plan", RAGGED)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("pad", [0, 9, 22])
def test_ragged_heads_equal_dense_attention(plan, family, pad):
    """Tokens one by one and three at once. With 22, row 0 is shorter than the budget, and heads may be equally long."""
    _, cache = check(family, plan, [30, 31, 32, 35, 38, *range(39, 55)], pad)
    assert pad == 22 or any(isinstance(layer, RaggedLayer) for layer in cache.layers)


@pytest.mark.parametrize("plan", RAGGED)
def test_ragged_heads_move_apart_as_tokens_come(plan, monkeypatch):
    """With little room behind each head there is none left several times over."""
    monkeypatch.setattr(growing, "ROOM", 1)
    moved, plain = [], RaggedLayer._make_room
    monkeypatch.setattr(RaggedLayer, "_make_room", lambda layer, spare: (moved.append(layer), plain(layer, spare)))
    check("llama", plan, [30, 31, 32, 35, 38, *range(39, 55)], 5)
    assert max(map(moved.count, moved)) >= 3


@pytest.mark.parametrize("plan", RAGGED)
def test_ragged_heads_store_what_they_keep_and_no_more(plan):
    model, inputs = tiny("llama"), prompt(length=60)
    with tt.apply(plan, model) as session, torch.no_grad():
        cache = model(**inputs).past_key_values
    for layer in cache.layers:
        assert isinstance(layer, RaggedLayer) and layer.real.sum(-1).unique().numel() > 1
        assert layer.entries == 2 * 2 * 12
        tensors = [t for part in (layer._flat, layer._padded) for t in part.values()]
        assert sum(t.untyped_storage().nbytes() for t in tensors) == layer.nbytes == layer.entries * 2 * 8 * 4
    assert session.report().stages["cache"].bytes_after == sum(layer.nbytes for layer in cache.layers)


def test_ragged_heads_survive_rows_that_move_and_tokens_that_are_taken_back():
    model, inputs = tiny("llama"), prompt(length=40, pad=6)
    with tt.apply("ada_kv(budget=12, base=knorm)", model), torch.no_grad():
        cache = model(**inputs).past_key_values
        keys, real = cache.layers[0].keys, cache.layers[0].real
        model(inputs["input_ids"][:, :3], past_key_values=cache)
        cache.crop(-3)
        layer = cache.layers[0]
        assert torch.equal(layer.keys[layer.real], keys[real]) and layer.seen == 40
        assert layer.nbytes == (int(real.sum()) + 4 * (3 + ROOM)) * 2 * 8 * 4  # room behind each of four heads stays
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 0]))
        cache.batch_select_indices(torch.tensor([0, 2]))
        assert torch.equal(layer.keys[layer.real], keys[[1, 0]][real[[1, 0]]])
        assert layer.nbytes == int(real.sum()) * 2 * 8 * 4
        cache.reset()
        again = model(**inputs, past_key_values=cache)
        torch.testing.assert_close(again.logits, model(**inputs).logits)
        assert cache.layers[0].entries == 2 * 2 * 12 and cache.layers[0].nbytes == 2 * 2 * 12 * 2 * 8 * 4


def test_beams_and_drafts_run_over_ragged_heads():
    model, inputs = tiny("llama"), prompt(length=40)
    inputs["input_ids"][:, 32:] = inputs["input_ids"][:, 31:39]
    plan, more = "ada_kv(budget=16, base=knorm)", {"max_new_tokens": 16, "do_sample": False}
    with tt.apply(plan, model):
        plain = model.generate(**inputs, **more)
        assert model.generate(**inputs, **more, num_beams=2).shape == (2, 56)
    with tt.apply(f"{plan} decode=prompt_lookup(adaptive=False)", model) as session:
        assert torch.equal(model.generate(**inputs, **more), plain)
    assert session.report().stages["decode"].extra["drafted"] > 0


# ---- what cannot work says so ----------------------------------------------------------------------------------------


def test_a_decode_stage_beside_repeated_reductions_is_refused():
    with (
        pytest.raises(tt.ThriftError, match="leave out 'every'"),
        tt.apply("knorm(budget=16, every=4) decode=prompt_lookup()", tiny("llama")),
    ):
        pass


def test_what_was_reduced_cannot_be_taken_back():
    model, inputs = tiny("llama"), prompt(length=30)
    with torch.no_grad(), tt.apply("knorm(budget=16, every=4)", model):
        cache = model(**inputs).past_key_values
        for t in range(5):
            model(torch.full((2, 1), 3 + t), past_key_values=cache)
        cache.crop(-1)
        assert cache.layers[0].stored == 16
        with pytest.raises(tt.ThriftError, match="taken back"):
            cache.crop(-1)
    with torch.no_grad(), tt.apply("h2o(budget=16, every=4)", model):
        cache = model(**inputs).past_key_values
        model(torch.full((2, 1), 3), past_key_values=cache)
        with pytest.raises(tt.ThriftError, match="taken back"):
            cache.crop(-1)


def test_a_cache_filled_elsewhere_is_taken_over_or_refused():
    model, inputs = tiny("llama"), prompt(length=30, pad=4)
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        token = {"input_ids": torch.full((2, 1), 3), "attention_mask": mask}
        with tt.apply("snapkv(budget=8, window=4, every=1)", model):
            taken = copy.deepcopy(cache)
            model(**token, past_key_values=taken)
        assert [layer.stored for layer in taken.layers] == [8, 8] and (taken.layers[0].positions >= 4)[0].all()
        with tt.apply("h2o(budget=8, every=1)", model), pytest.raises(tt.ThriftError, match="same with block"):
            model(**token, past_key_values=cache)
        with tt.apply("ada_kv(budget=8, base=knorm)", model):
            ragged = model(**inputs).past_key_values
        with tt.apply("knorm(budget=8, every=1)", model), pytest.raises(tt.ThriftError, match="different numbers"):
            model(**token, past_key_values=ragged)


def test_methods_that_reduce_once_still_do():
    assert set(METHODS) - set(REPEATED) == {"dapq", "speckv", "tca_attention"}
    model, inputs = tiny("llama"), prompt(length=30)
    with tt.apply("knorm(budget=16)", model):
        out = model.generate(**inputs, max_new_tokens=30, min_new_tokens=30, return_dict_in_generate=True)
    assert out.past_key_values.layers[0].stored == 16 + 29
