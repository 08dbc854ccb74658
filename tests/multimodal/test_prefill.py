"""FastV and PyramidDrop on text models that are told that some of their tokens are visual."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tokenthrift as tt
from tiny_models import fingerprint, generate, prompt, tiny
from tokenthrift.core.method import find
from tokenthrift.core.view import View
from tokenthrift.models import cascade_stage
from tokenthrift.models.decoder import DecoderAdapter
from tokenthrift.models.kv import ReducedLayer
from tokenthrift.ops.attention import attention_rows

GOLDEN = Path(__file__).parents[1] / "golden" / "multimodal" / "more_selection.npz"
FASTV, PYRAMID = "prefill=fastv(keep=0.4)", "prefill=pyramiddrop()"
PLANS = pytest.mark.parametrize("plan", [FASTV, PYRAMID])
FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
BOTH = pytest.mark.parametrize("attention", ["sdpa", "eager"])
VISUAL = slice(12, 32)
"""Where the 40 tokens of a prompt are visual, in a batch of which the first row is padded by 5."""


def made(family="llama", attention="sdpa"):
    return tiny(family, attention, num_hidden_layers=8)


def visual_tokens(batch=2, length=40, where=VISUAL):
    visual = torch.zeros(batch, length, dtype=torch.bool)
    visual[:, where] = True
    return visual


@pytest.fixture
def sees(monkeypatch):
    """Lets adapters say which tokens of the prompt are visual."""

    def set_to(visual):
        monkeypatch.setattr(DecoderAdapter, "visual", lambda self: visual, raising=False)

    set_to(visual_tokens())
    return set_to


def reference(model, ids, ends, visual, pad=0):
    """Logits of one prompt, and the tokens that each layer computes: a dense eager model that hides what is gone."""
    body, n = model.model, len(ids)
    turns = body.rotary_emb(torch.zeros(1, n, 48), position_ids=torch.arange(n)[None])
    left, alive = torch.ones(n, dtype=torch.bool), []
    hidden, out = body.embed_tokens(ids)[None], torch.zeros(n, 48)
    for i, layer in enumerate(body.layers):
        alive.append(left)
        mask = torch.ones(n, n, dtype=torch.bool).tril() & left
        mask = torch.zeros(n, n).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
        seen = {}
        hook = layer.self_attn.register_forward_hook(lambda _m, _i, o, seen=seen: seen.update(weights=o[1]))
        hidden = layer(hidden, attention_mask=mask, position_embeddings=turns)
        hook.remove()
        out[left] = hidden[0, left]
        if i in ends:
            score = seen["weights"][0, :, -1].mean(0).masked_fill(~(left & visual), -1)
            best = score.topk(ends[i]).indices
            left = (left & ~visual).index_fill(0, best, True)
    return model.lm_head(body.norm(out)), alive


@pytest.mark.parametrize(("n", "system", "image", "rank"), [(60, 7, 40, 20), (90, 35, 50, 7)])
def test_fastv_keeps_what_the_authors_code_keeps(n, system, image, rank):
    cases = {name: torch.from_numpy(np.load(GOLDEN)[f"fastv_{name}_{n}_{system}_{image}_{rank}"]) for name in
             ("queries", "keys", "kept")}  # fmt: skip
    visual = visual_tokens(1, n, slice(system, system + image))
    view = View(visual=visual, visual_lengths=visual.sum(1), mask=torch.ones_like(visual))
    view.offer("attention", lambda rows: attention_rows(cases["queries"][:, :, -rows:], cases["keys"], 8**-0.5))
    map = find("fastv").make(keep=rank).reduce(view)
    assert map.anchors[0].tolist() == cases["kept"].tolist()


@PLANS
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_prefill_is_that_of_the_plain_restatement(plan, family, sees):
    model, eager, ids = made(family), made(family, "eager"), prompt(batch=1)["input_ids"]
    sees(visual_tokens(1))
    ends = {1: 8} if plan == FASTV else {1: 10, 3: 5, 5: 3}
    with tt.apply(plan, model) as session, torch.no_grad():
        got = model(ids, use_cache=True)
        token = got.logits[:, -1:].argmax(-1)
        later = model(token, past_key_values=got.past_key_values).logits
    with torch.no_grad():
        want, alive = reference(eager, ids[0], ends, visual_tokens(1)[0])
    torch.testing.assert_close(got.logits[0], want, atol=2e-4, rtol=2e-4)
    cache = got.past_key_values
    assert cache.get_seq_length() == 41
    for layer, left in zip(cache.layers, alive, strict=True):
        assert layer.keys.shape[2] == int(left.sum()) + 1
        assert not isinstance(layer, ReducedLayer) or layer.map.kept[0, 0, :40].equal(left)
    assert session.provenance()["prefill"].kept[0].equal(alive[-1])
    # A later token, at position 40, sees what each layer kept: the same as a dense pass that hides the rest.
    with torch.no_grad():
        text = torch.cat([ids, token], 1)
        mixed = _later(eager, text[0], alive)
    torch.testing.assert_close(later[0, -1], mixed, atol=2e-4, rtol=2e-4)


def _later(model, ids, alive):
    """Logits of a token behind a prompt of which each layer computed what was ``alive``."""
    body, n = model.model, len(ids)
    turns = body.rotary_emb(torch.zeros(1, n, 48), position_ids=torch.arange(n)[None])
    hidden = body.embed_tokens(ids)[None]
    for layer, left in zip(body.layers, alive, strict=True):
        left = torch.cat([left, torch.tensor([True])])
        mask = torch.ones(n, n, dtype=torch.bool).tril() & left
        mask = torch.zeros(n, n).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
        hidden = layer(hidden, attention_mask=mask, position_embeddings=turns)
    return model.lm_head(body.norm(hidden))[0, -1]


@pytest.mark.parametrize(
    ("plan", "visual_left"), [(FASTV, [20] * 2 + [8] * 6), (PYRAMID, [20] * 2 + [10] * 2 + [5] * 2 + [3] * 2)]
)
def test_layers_hold_all_text_and_the_visual_tokens_of_the_plan(plan, visual_left, sees):
    model, inputs, visual = made(), prompt(pad=5), visual_tokens()
    with tt.apply(plan, model) as session, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    text = inputs["attention_mask"].bool() & ~visual
    for layer, count in zip(cache.layers, visual_left, strict=True):
        assert layer.get_seq_length() == 40
        assert layer.keys.shape[2] == (20 + count if count < 20 else 40)
        if count < 20:
            kept = layer.map.kept[:, 0]
            assert (kept | ~text).all() and (kept & visual).sum(1).tolist() == [count, count]
            assert layer.real[:, 0].sum(1).tolist() == [15 + count, 20 + count]
    record = session.report().stages["prefill"]
    assert record.tokens_before == 8 * 75 and record.tokens_after == 8 * 35 + 2 * sum(visual_left)
    assert session.flops < session.flops_dense


@PLANS
@FAMILIES
@BOTH
def test_a_padded_row_generates_what_it_generates_alone(plan, family, attention, sees):
    model, inputs = made(family, attention), prompt(pad=5)
    with tt.apply(plan, model):
        out = generate(model, inputs, 6, min_new_tokens=6)
        for row, pad in enumerate((5, 0)):
            sees(visual_tokens()[row : row + 1, pad:])
            alone = generate(model, {k: v[row : row + 1, pad:] for k, v in inputs.items()}, 6, min_new_tokens=6)
            assert torch.equal(out[row, pad:], alone[0])
    assert not torch.equal(out, generate(model, inputs, 6, min_new_tokens=6))


@PLANS
def test_rows_may_have_different_numbers_of_visual_tokens_or_none(plan, sees):
    model, inputs, visual = made(), prompt(batch=3), visual_tokens(3)
    visual[1], visual[2, :20] = False, False
    sees(visual)
    with tt.apply(plan, model), torch.no_grad():
        out = model(**inputs, use_cache=True)
        kept = out.past_key_values.layers[-1].map.kept[:, 0]
        share = 0.4 if plan == FASTV else 0.125
        assert (kept & visual).sum(1).tolist() == [int(20 * share + 0.5), 0, int(12 * share + 0.5)]
        assert (kept | visual).all()
        for row in range(3):
            sees(visual[row : row + 1])
            alone = model(**{k: v[row : row + 1] for k, v in inputs.items()}).logits
            torch.testing.assert_close(alone[0], out.logits[row], atol=2e-4, rtol=2e-4)
        sees(visual)
        together = generate(model, inputs, 6, min_new_tokens=6)
        for row in range(3):
            sees(visual[row : row + 1])
            alone = generate(model, {k: v[row : row + 1] for k, v in inputs.items()}, 6, min_new_tokens=6)
            assert torch.equal(alone[0], together[row])


def test_rotations_of_several_axes_are_those_of_the_columns_that_are_left():
    """As of models whose positions have a time, a height and a width."""
    turns, order = torch.randn(3, 2, 5, 4), torch.tensor([[0, 2, 4], [1, 2, 3]])
    left = cascade_stage._columns_of(turns, order)
    assert left.shape == (3, 2, 3, 4)
    assert left[:, 1].equal(turns[:, 1, 1:4]) and left[:, 0].equal(turns[:, 0, ::2])


@PLANS
@pytest.mark.parametrize("visual", [None, torch.zeros(2, 40, dtype=torch.bool)])
def test_prompts_without_visual_tokens_are_bit_identical(plan, visual, sees):
    model, inputs = made(), prompt(pad=5)
    tokens, logits = generate(model, inputs), model(**inputs).logits
    sees(visual)
    with tt.apply(plan, model):
        assert torch.equal(generate(model, inputs), tokens)
        assert torch.equal(model(**inputs).logits, logits)


@FAMILIES
@BOTH
def test_keeping_everything_is_bit_identical_and_leaves_no_trace(family, attention, sees):
    model, inputs = made(family, attention), prompt(pad=5)
    before = fingerprint(model)
    tokens, logits = generate(model, inputs), model(**inputs).logits
    for plan in ("fastv(keep=1.0)", "fastv(keep=20)", "fastv(keep=0.999)", "pyramiddrop(keep=1.0)"):
        with tt.apply(plan, model):
            assert torch.equal(generate(model, inputs), tokens)
            assert torch.equal(model(**inputs).logits, logits)
    with pytest.raises(RuntimeError, match="inside"), tt.apply(PYRAMID, model):
        assert not torch.equal(model(**inputs, logits_to_keep=1).logits, logits[:, -1:])
        raise RuntimeError("inside")
    assert fingerprint(model) == before
    assert torch.equal(model(**inputs).logits, logits)


def test_prompts_of_embeddings_are_those_of_their_tokens(sees):
    model, inputs = made(), prompt(pad=5)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with tt.apply(PYRAMID, model), torch.no_grad():
        want = model(**inputs).logits
        got = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
        assert torch.equal(got, want)
        out = generate(model, inputs)
        given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
        assert torch.equal(generate(model, given), out[:, 40:])


def test_only_the_rows_of_attention_that_are_asked_for_are_computed(sees, monkeypatch):
    rows = []

    def noted(query, key, scaling, mask=None):
        rows.append((query.shape[2], key.shape[2]))
        return attention_rows(query, key, scaling, mask)

    monkeypatch.setattr(cascade_stage, "attention_rows", noted)
    monkeypatch.setattr(cascade_stage, "attention_received", None)  # must not be called
    model = made()
    with tt.apply(PYRAMID, model), torch.no_grad():
        model(**prompt())
    assert rows == [(1, 40), (1, 30), (1, 25)]


def test_between_layers_all_tokens_are_there(sees):
    """Some models add features of the encoder to the visual tokens after their first layers."""
    model, seen = made(), []
    hooks = [
        layer.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0].shape[1]))
        for layer in model.model.layers
    ]
    with tt.apply(PYRAMID, model), torch.no_grad():
        hidden = model(**prompt(), output_hidden_states=True).hidden_states
    assert seen == [40] * 8 and [h.shape[1] for h in hidden] == [40] * 9
    left = visual_tokens() & (hidden[3] != hidden[2]).any(-1)  # what layer 2 computed
    assert left.sum(1).tolist() == [10, 10]
    for hook in hooks:
        hook.remove()


def test_beams_and_a_second_turn_work(sees):
    model, inputs = made(), prompt()
    with tt.apply(FASTV, model), torch.no_grad():
        one = generate(model, inputs, 6, min_new_tokens=6)
        sees(visual_tokens(6))
        assert generate(model, inputs, 6, min_new_tokens=6, num_beams=3).shape == one.shape
        sees(visual_tokens(2))
        cache = model(**inputs, use_cache=True).past_key_values
        more = prompt(length=4, seed=3)["input_ids"]
        several = model(more, past_key_values=cache).logits
        cache = model(**inputs, use_cache=True).past_key_values
        for i in range(4):
            single = model(more[:, i : i + 1], past_key_values=cache).logits
            torch.testing.assert_close(single[:, 0], several[:, i], atol=2e-4, rtol=2e-4)


def test_stages_are_those_of_the_authors_scripts():
    cascade = find("pyramiddrop").make()
    assert cascade.token_shares(32) == {7: 0.5, 15: 0.25, 23: 0.125}
    assert cascade.token_shares(3) == {0: 0.5, 1: 0.25}
    assert cascade.token_shares(1) == {}
    assert find("pyramiddrop").make(layers=[2, 5], keep=0.3).token_shares(6) == pytest.approx({1: 0.3, 4: 0.09})
    assert find("fastv").make().token_shares(32) == {1: 0.5}


@pytest.mark.parametrize(
    "wrong",
    [
        "fastv(keep=0)",
        "fastv(keep=0.0)",
        "fastv(keep=1.1)",
        "fastv(layer=0)",
        "pyramiddrop(keep=0.0)",
        "pyramiddrop(keep=1.5)",
        "pyramiddrop(layers=[])",
        "pyramiddrop(layers=[4, 2])",
        "pyramiddrop(layers=[0, 2])",
        "pyramiddrop(layers=3)",
    ],
)
def test_impossible_parameters_are_refused_when_the_plan_is_read(wrong):
    with pytest.raises(tt.ThriftError) as error:
        tt.Plan.parse(f"prefill={wrong}")
    assert "\n" not in str(error.value)
    with pytest.raises(tt.ThriftError):
        find(wrong.split("(")[0]).make(keep=float("nan"))


@pytest.mark.parametrize(
    ("family", "plan", "words"),
    [
        ("llama", "fastv(layer=8)", "8 layers"),
        ("llama", "pyramiddrop(layers=[4, 8])", "8 layers"),
        ("llama", "fastv() cache=snapkv()", "leave out cache"),
        ("llama", "pyramiddrop() decode=prompt_lookup()", "decode=..."),
        ("gemma3_text", "fastv()", "full attention"),
    ],
)
def test_plans_that_cannot_run_are_refused(family, plan, words, sees):
    model = tiny(family) if family == "gemma3_text" else made(family)
    before = fingerprint(model)
    with pytest.raises(tt.ThriftError, match=words), tt.apply(plan, model):
        pass
    assert fingerprint(model) == before


@PLANS
def test_a_model_that_reads_text_only_is_refused(plan):
    model = made()
    before = fingerprint(model)
    with pytest.raises(tt.ThriftError, match="prefill=gemfilter") as error, tt.apply(plan, model):
        pass
    assert "\n" not in str(error.value) and fingerprint(model) == before
