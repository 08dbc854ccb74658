"""What methods do when they reduce a cache once more: their own invariants."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.cache_utils import DynamicCache

import tokenthrift as tt
from cache_plans import MERGING
from cache_plans import plan as plan_of
from tiny_models import prompt, tiny
from tokenthrift.models.kv import RaggedLayer

REPEATED = [info.name for info in tt.methods(stage="cache") if "every" in info.defaults]
EACH = pytest.mark.parametrize("name", REPEATED)


def plan(name, budget, every):
    return plan_of(name, budget)[:-1] + f", every={every})"


def feed(model, inputs, cuts, cache=None):
    """The cache after the text came in these pieces, and the logits."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    mask, start, logits = inputs["attention_mask"], int(cache.get_seq_length()), []
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        for end in cuts:
            piece = {"input_ids": inputs["input_ids"][:, start:end], "attention_mask": mask[:, :end]}
            out = model(**piece, position_ids=positions[:, start:end], past_key_values=cache, use_cache=True)
            logits.append(out.logits)
            start = end
    return cache, torch.cat(logits, 1)


def distinct(length, pad=0):
    """A prompt whose rows have no token twice: equal tokens have keys of equal length in the first layer."""
    inputs, generator = prompt(length=length, pad=pad), torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(94, generator=generator)[:length] + 3 for _ in range(2)])
    return {**inputs, "input_ids": ids * inputs["attention_mask"]}


def originals(model, run):
    """All keys and values that layer 0 ever computed, while ``run`` runs."""
    found = []
    update = DynamicCache.update

    def noted(self, keys, values, layer, *args, **kwargs):
        if layer == 0:
            found.append((keys.clone(), values.clone()))
        return update(self, keys, values, layer, *args, **kwargs)

    DynamicCache.update = noted
    try:
        out = run()
    finally:
        DynamicCache.update = update
    return out, [torch.cat(parts, 2) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("name", [name for name in REPEATED if name != "tree_kv"])
@pytest.mark.parametrize("pad", [0, 6])
def test_a_prompt_in_two_parts_is_reduced_like_one_where_the_first_part_fits(name, pad):
    """Heads with queries of their own: where they share keys, ems takes its means in another order."""
    model, inputs = tiny("gpt_neox"), prompt(length=30, pad=pad)
    with tt.apply(plan(name, 12, 20), model):
        once, twice = (feed(model, inputs, cuts)[0] for cuts in ([30], [10, 30]))
    for a, b in zip(once.layers[:1], twice.layers[:1], strict=True):  # later layers saw the first part anew
        assert torch.equal(a.held, b.held) and (a.bias is None) == (b.bias is None)
        real = a.held
        assert torch.equal(a.positions[real], b.positions[real])
        torch.testing.assert_close(a.keys[real], b.keys[real], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.values[real], b.values[real], atol=1e-4, rtol=1e-4)


@EACH
def test_rows_that_change_places_take_all_that_belongs_to_them(name):
    model, inputs = tiny("llama"), prompt(length=45, pad=6)
    swapped = {k: v.flip(0) for k, v in inputs.items()}
    with tt.apply(plan(name, 12, 4), model):
        cache, _ = feed(model, inputs, [30, 31])
        other = copy.deepcopy(cache)
        other.batch_select_indices(torch.tensor([1, 0]))
        _, want = feed(model, inputs, [32, 36, 45], cache)
        _, got = feed(model, swapped, [32, 36, 45], other)
    torch.testing.assert_close(got.flip(0)[inputs["attention_mask"][:, 31:45].bool()], want.flatten(0, 1))


# ---- expected_attention ---------------------------------------------------------------------------------------------


def test_expected_attention_goes_on_from_its_last_queries():
    """With as many queries as there were since the start, in pieces or at once; with fewer, others are kept."""
    model, inputs, kept = tiny("llama"), prompt(length=60, pad=9), {}
    for recent in (20, 60, 90):
        with tt.apply(f"expected_attention(budget=30, sinks=2, future=8, recent={recent}, every=30)", model):
            cache, _ = feed(model, inputs, [28, *range(29, 61)])
        layer = cache.layers[0]
        assert layer.queries.shape[2] == layer.rotary.cos.shape[1] == min(recent, 60)
        kept[recent] = layer.positions
    assert torch.equal(kept[60], kept[90]) and not torch.equal(kept[20], kept[90])


# ---- pyramid_kv -----------------------------------------------------------------------------------------------------


def test_pyramid_budgets_follow_the_length_of_the_text():
    model, inputs = tiny("llama", num_hidden_layers=3), prompt(length=60)
    method = tt.Plan.parse("pyramid_kv(budget=12, window=3, beta=3, every=1)").at("cache")[0]
    with tt.apply("pyramid_kv(budget=12, window=3, beta=3, every=1)", model):
        for n in (14, 20, 60):
            cache, _ = feed(model, inputs, [10, *range(11, n + 1)])
            assert [layer.stored for layer in cache.layers] == method.budgets(n, 3)
    assert method.budgets(14, 3) == [12, 12, 12] and method.budgets(60, 3) == [20, 12, 4]


# ---- ada_kv ---------------------------------------------------------------------------------------------------------

PARTING = ["snapkv(window=4)", "knorm", "keydiff"]
BASES = [*PARTING, "lagkv(sinks=2, lag=3)", "expected_attention(sinks=2, future=8, recent=16)"]
FORCING = ["h2o", "ems(window=4)", "tova"]
"""They keep some entries whatever their score, or choose for all heads together, which ada_kv does not."""


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("pad", [0, 22])
def test_ada_kv_whose_heads_share_nothing_is_its_base(base, pad):
    model, inputs = tiny("llama"), distinct(length=50, pad=pad)
    alone = f"{base.rstrip(')')}{', ' if '(' in base else '('}budget=12, every=4)"
    with tt.apply(alone, model):
        want, logits = feed(model, inputs, [30, *range(31, 51)])
    with tt.apply(f"ada_kv(budget=12, base='{base}', safeguard=1.0, every=4)", model):
        got, shown = feed(model, inputs, [30, *range(31, 51)])
    for a, b in zip(got.layers, want.layers, strict=True):
        assert torch.equal(a.positions[a.held], b.positions[b.held])
    torch.testing.assert_close(shown[inputs["attention_mask"].bool()], logits[inputs["attention_mask"].bool()])


@pytest.mark.parametrize("base", BASES + FORCING)
def test_ada_kv_shares_out_its_budget_anew_and_stores_no_more(base):
    """The prompt fits into the budget, so that heads part only later."""
    model, inputs = tiny("llama"), prompt(length=60, pad=5)
    with tt.apply(f"ada_kv(budget=12, base='{base}', safeguard=0.25, every=6)", model) as session:
        cache, _ = feed(model, inputs, [10, *range(11, 61)])
    for layer in cache.layers:
        assert layer.fresh == 2  # 10 tokens, then eight times six
        counts = layer.held.sum(-1)
        assert counts.sum(-1).tolist() == [2 * 14] * 2 and (counts >= 3 + 2).all()
        if base in PARTING:
            room = 4 * (7 - layer.fresh)  # four heads may get six more tokens each after their first
            assert layer.nbytes == (layer.entries + room) * 2 * 8 * 4
            assert isinstance(layer, RaggedLayer) and (counts[:, 0] != counts[:, 1]).any()
    assert session.report().stages["cache"].extra["reduced_again"] == 2 * 8


def test_ada_kv_keeps_the_best_of_all_heads():
    model, inputs = tiny("llama", num_hidden_layers=1), distinct(length=42)
    with tt.apply("ada_kv(budget=12, base=knorm, safeguard=0, every=4)", model):
        (cache, _), (keys, _) = originals(model, lambda: feed(model, inputs, [30, *range(31, 42)]))
        before = cache.layers[0].positions, cache.layers[0].held
        (cache, _), (new, _) = originals(model, lambda: feed(model, inputs, [42], cache))
    layer, norms = cache.layers[0], torch.cat([keys, new], 2).norm(dim=-1)
    assert layer.fresh == 0 and layer.entries == 2 * 2 * 12
    for row in range(2):
        there = {(h, p) for h in range(2) for p in [*before[0][row, h][before[1][row, h]].tolist(), 41]}
        kept = {(h, p) for h in range(2) for p in layer.positions[row, h][layer.held[row, h]].tolist()}
        assert kept == set(sorted(there, key=lambda at: norms[row, *at])[:24]) and len(there) == 2 * 16


def test_ada_kv_says_which_bases_can_go_on():
    for wrong in (
        "ada_kv(every=4, base=dapq)",
        "ada_kv(every=4, base='knorm(every=2)')",
        "ada_kv(every=4, budget=0.5)",
    ):
        with pytest.raises(tt.ThriftError) as error:
            tt.Plan.parse(wrong)
        assert "every" in str(error.value) and "\n" not in str(error.value)


# ---- merged entries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MERGING))
@pytest.mark.parametrize("pad", [0, 20])
@pytest.mark.parametrize("cuts", [[30, *range(31, 61)], [10, 25, 40, 60]])
def test_merged_entries_are_what_their_map_makes_of_all_tokens(name, pad, cuts):
    model, inputs = tiny("llama"), prompt(length=60, pad=pad)
    with tt.apply(plan(name, 12, 5), model):
        (cache, _), parts = originals(model, lambda: feed(model, inputs, cuts))
    layer = cache.layers[0]
    map, held = layer.map.extend(layer.fresh), layer.held
    assert map.n_in == 60 and map.n_out == layer.stored and (map.sizes() > 1).any()
    for stored, part in zip((layer.keys, layer.values), parts, strict=True):
        torch.testing.assert_close(stored[held], map.apply(part)[held], atol=1e-4, rtol=1e-4)
    if name == "razor_attention":
        torch.testing.assert_close(layer.bias[held].exp(), map.sizes()[held])


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("cuts", [[30, *range(31, 59)], [10, 30, 58]])
def test_razor_attention_moves_its_window_and_all_that_leaves_it_joins_the_compensation_token(every, cuts):
    """Against its definition over the whole text. Head 1 of layer 0 looks back, and keeps all."""
    model, inputs = tiny("llama"), prompt(length=58, pad=6)
    with tt.apply(f"razor_attention(budget=9, sinks=3, least=0, heads=[[0, 1]], every={every})", model) as session:
        (cache, _), (keys, values) = originals(model, lambda: feed(model, inputs, cuts))
    layer = cache.layers[0]
    assert isinstance(layer, RaggedLayer)
    for row, pad in enumerate((6, 0)):
        between = 58 - pad - 3 - 5 - layer.fresh
        for part, all_of_it in ((layer.keys, keys), (layer.values, values)):
            local, looking = (part[row, h][layer.held[row, h]] for h in (0, 1))
            real = all_of_it[row, :, pad:]
            want = torch.cat([real[0, :3], real[0, 3 : 3 + between].mean(0, keepdim=True), real[0, 3 + between :]])
            torch.testing.assert_close(local, want)
            assert torch.equal(looking, real[1])
        assert layer.bias[row, 0][layer.held[row, 0]].exp().round().tolist() == [1] * 3 + [between] + [1] * (
            5 + layer.fresh
        )
    assert layer.entries == 2 * (9 + layer.fresh) + 58 + 52
    assert layer.nbytes == layer.entries * 2 * 8 * 4
    assert session.provenance()["cache"][1].kept.sum() == 2 * (58 + 52) - 4 * cache.layers[1].fresh


def test_razor_attention_counts_the_compensation_token_while_decoding():
    """A step's attention over what is stored, written out, equals the layer's own."""
    model, inputs = tiny("llama", "eager", num_hidden_layers=1), prompt(length=50)
    with tt.apply("razor_attention(budget=9, sinks=3, least=0, heads=[], every=1)", model):
        cache, _ = feed(model, inputs, [30, *range(31, 50)])
        layer = copy.deepcopy(cache.layers[0])
        caught = {}
        attention = model.model.layers[0].self_attn
        attention.q_proj.register_forward_hook(lambda m, a, out: caught.update(q=out))
        attention.o_proj.register_forward_pre_hook(lambda m, a: caught.update(out=a[0]))
        _, (keys, values) = originals(model, lambda: feed(model, inputs, [50], cache))
        attention.q_proj._forward_hooks.clear()
        attention.o_proj._forward_pre_hooks.clear()
    rotary = model.model.rotary_emb(torch.zeros(1), torch.tensor([[49]]))
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q = apply_rotary_pos_emb(caught["q"].view(2, 1, 6, 8).transpose(1, 2), keys, *rotary)[0]
    for h in range(6):
        stored = torch.cat([layer.keys[:, h // 3], keys[:, h // 3]], 1)
        counts = torch.cat([layer.bias[:, h // 3].exp(), torch.ones(2, 1)], 1)
        weight = counts * (stored @ q[:, h, 0, :, None] * 8**-0.5).exp().squeeze(-1)
        held = torch.cat([layer.values[:, h // 3], values[:, h // 3]], 1)
        want = ((weight / weight.sum(-1, keepdim=True))[:, None] @ held)[:, 0]
        torch.testing.assert_close(caught["out"].view(2, 6, 8)[:, h], want, atol=1e-4, rtol=1e-4)


def test_ems_merges_again_what_is_alike():
    """Equal values and keys without positions would merge to themselves: here only into means of their own kind."""
    model, inputs = tiny("llama"), prompt(length=60, pad=4)
    for threshold, merges in ((0.0, True), (1.0, False)):
        with tt.apply(f"ems(budget=12, window=4, threshold={threshold}, every=4)", model):
            cache, _ = feed(model, inputs, [30, *range(31, 61)])
        for layer in cache.layers:
            sizes = layer.map.sizes()
            assert layer.stored == 12 + layer.fresh and bool((sizes > 1).any()) is merges
            assert layer.bias is None
            assert (sizes.sum(-1) == layer.map.kept.sum(-1)).all()


@pytest.mark.parametrize("plan", ["razor_attention(every=1)", "ems(every=-1)", "expected_attention(recent=1, every=4)"])
def test_what_cannot_go_on_is_refused_in_one_line(plan):
    with pytest.raises(tt.ThriftError) as error:
        tt.Plan.parse(plan)
    assert "\n" not in str(error.value)
