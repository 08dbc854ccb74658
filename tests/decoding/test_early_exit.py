"""Self-drafting by early exit: exact, the drafts of the truncated model, and none where they do not pay."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tokenthrift as tt
from tokenthrift.core.draft import Draft
from tokenthrift.core.errors import ThriftError
from tokenthrift.decoding.early_exit import Acceptance, Confidence, ExitDrafters, best_exit, tokens_per_layer
from tokenthrift.decoding.protocols import Request
from tokenthrift.models.depth import Depth

PLANS = [
    ("layer_skip(exit=1, adaptive=False)", "sdpa"),
    ("layer_skip(exit=1, draft=2)", "eager"),
    ("dynamic_exit()", "sdpa"),
    ("dynamic_exit(exits=None, confidence=False, draft=3)", "eager"),
]


@pytest.fixture(autouse=True)
def eager_to_draft(monkeypatch):
    """The head of a tiny model outweighs its layers, and its forwards take no time: draft all the same."""
    monkeypatch.setattr(Depth, "head_layers", property(lambda self: 0.0))
    monkeypatch.setattr("tokenthrift.decoding.planner.Planner.cut", lambda self, drafts: drafts)
    monkeypatch.setattr("tokenthrift.decoding.planner.Planner.rests", lambda self: False)


@pytest.fixture(scope="module")
def deep():
    """Six layers, of which those from the third on change nothing: every exit from 2 on is always right."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def padded(prompts, lengths=(24, 17, 9)):
    rows = [prompts(seed, length) for seed, length in enumerate(lengths)]
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()}


@pytest.mark.parametrize(("plan", "attention"), PLANS)
def test_greedy_output_is_that_of_plain_generate(model, prompts, monkeypatch, plan, attention):
    rate = Acceptance.rate
    monkeypatch.setattr(
        Acceptance, "rate", lambda self, exit: 0.7 + 0.3 * rate(self, exit)
    )  # of two layers one is dear
    batch, one = padded(prompts), {"input_ids": torch.tensor([prompts(4)])}
    before, drafted = model.config._attn_implementation, 0
    model.set_attn_implementation(attention)
    try:
        for inputs in (batch, one):
            for extra in ({}, {"eos_token_id": [1, 5], "repetition_penalty": 1.2}):
                options = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0, **extra}
                plain = model.generate(**inputs, **options)
                with tt.apply(f"decode={plan}", model) as session:
                    assert model.generate(**inputs, **options).tolist() == plain.tolist()
                drafted += session.records["decode"].extra["drafted"]
        assert drafted > 0
        assert len(Depth(model).layers) == model.config.num_hidden_layers
    finally:
        model.set_attn_implementation(before)


def test_the_cache_afterwards_is_that_of_plain_generate(model, prompts):
    inputs = padded(prompts)
    options = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0, "return_dict_in_generate": True}
    plain = model.generate(**inputs, **options)
    with tt.apply("decode=layer_skip(exit=1, adaptive=False)", model):
        ours = model.generate(**inputs, **options)
    for a, b in zip(ours.past_key_values.layers, plain.past_key_values.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("new", [1, 2, 3])
def test_few_new_tokens(deep, prompts, new):
    ids = torch.tensor([prompts(0)])
    plain = deep.generate(ids, do_sample=False, max_new_tokens=new)
    with tt.apply("decode=layer_skip(exit=2, adaptive=False)", deep):
        assert deep.generate(ids, do_sample=False, max_new_tokens=new).tolist() == plain.tolist()


def test_drafts_are_what_the_truncated_model_generates(model, prompts, monkeypatch):
    """In a padded batch: greedy continuations by the first layer alone, as ``assistant_early_exit`` makes them."""
    seen: list[tuple[list[list[int]], list[Draft]]] = []
    text: list[list[int]] = [prompts(0, 20), prompts(1, 13)]
    propose, extend = ExitDrafters.propose, ExitDrafters.extend

    def spy_extend(self, tokens):
        for row, new in zip(text, tokens, strict=True):
            row += new
        extend(self, tokens)

    def spy(self, limits):
        drafts = propose(self, limits)
        seen.append(([list(row) for row in text], drafts))
        return drafts

    monkeypatch.setattr(ExitDrafters, "extend", spy_extend)
    monkeypatch.setattr(ExitDrafters, "propose", spy)
    inputs = padded(lambda seed, n: prompts(seed, n), (20, 13))
    with tt.apply("decode=layer_skip(exit=1, draft=4, adaptive=False)", model):
        model.generate(**inputs, do_sample=False, max_new_tokens=24, pad_token_id=0)
    short, compared = deepcopy(model), 0
    depth = Depth(short)
    depth.backbone.layers = depth.backbone.layers[:1]
    # The first layer's keys of committed tokens are the whole model's own, so the truncated model needs no other cache.
    for rows, drafts in seen:
        for row, draft in zip(rows, drafts, strict=True):
            for k, guess in enumerate(draft.tokens):
                logits = short(torch.tensor([[*row, *draft.tokens[:k]]]), use_cache=False).logits[0, -1]
                assert guess == int(logits.argmax())
                compared += 1
    assert compared > 30


def test_a_model_made_for_early_exit_saves_the_forwards_it_should(deep, prompts):
    ids = torch.tensor([prompts(0)])
    with tt.apply("decode=layer_skip(exit=2, draft=6, adaptive=False)", deep) as session:
        deep.generate(ids, do_sample=False, max_new_tokens=29)
    record = session.records["decode"]
    assert record.tokens_after == 1 + 28 // 7 and record.extra["accepted"] == record.extra["drafted"] == 24


def test_the_exit_that_suffices_is_found(deep, prompts):
    ids = torch.tensor([prompts(0), prompts(1)])
    made: list[ExitDrafters] = []
    plan = tt.Plan.parse("decode=dynamic_exit(exits=None)")
    start = type(plan.at("decode")[0]).start_batch

    def spy(self, prompts, request):
        made.append(start(self, prompts, request))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(plan.at("decode")[0]), "start_batch", spy)
        with tt.apply(plan, deep) as session:
            deep.generate(ids, do_sample=False, max_new_tokens=60)
    rates = {e: made[0].acceptance.rate(e) for e in range(1, 6)}
    assert rates[2] == rates[5] > 0.9 > rates[1]
    assert best_exit(rates, 8, 6)[0] == 2
    assert session.records["decode"].tokens_after < 30
    accepted, drafted = (session.records["decode"].extra[name] for name in ("accepted", "drafted"))
    assert accepted > 0.8 * drafted


def test_shadow_tokens_are_what_the_layers_would_have_said(model, prompts):
    """Against the model's own hidden states, position by position, also where drafts were rejected in between."""
    ids, committed = torch.tensor([prompts(2)]), 24
    seen = []
    original = Acceptance.note

    def spy(self, exit, right):
        seen.append((exit, list(right)))
        original(self, exit, right)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Acceptance, "note", spy)
        patch.setattr("tokenthrift.decoding.early_exit._RARELY", 0)
        patch.setattr("tokenthrift.decoding.early_exit.best_exit", lambda *args: (1, 3))
        with tt.apply("decode=dynamic_exit(exits=None)", model):
            out = model.generate(ids, do_sample=False, max_new_tokens=committed)
    said = [hit for exit, right in seen for hit in right if exit == 1]
    states = model(out, output_hidden_states=True).hidden_states[1][0]
    guesses = Depth(model).read(states).argmax(-1)[ids.shape[1] :]  # the first token came from the prompt's forward
    truth = out[0, ids.shape[1] + 1 :]
    assert said == (guesses[: len(truth)] == truth).tolist()[: len(said)]
    assert len(said) >= committed - 5 and True in said  # the last step's are not looked at
    assert False in said or model.config.model_type == "gemma3_text"


def test_without_hope_nothing_is_drafted_and_exits_are_looked_at_ever_more_rarely(llama, prompts, monkeypatch):
    monkeypatch.setattr(Acceptance, "rate", lambda self, exit: 0.0)
    looks = []
    look = ExitDrafters._look
    monkeypatch.setattr(ExitDrafters, "_look", lambda self, tokens: (looks.append(1), look(self, tokens)))
    forwards = []
    monkeypatch.setattr(ExitDrafters, "_forward", lambda *args: forwards.append(1))
    ids = torch.tensor([prompts(0)])
    for plan in ("dynamic_exit()", "layer_skip(exit=1)"):
        looks.clear()
        with tt.apply(f"decode={plan}", llama) as session:
            llama.generate(ids, do_sample=False, max_new_tokens=120)
        record = session.records["decode"]
        assert record.tokens_after == record.tokens_before == 120 and record.extra["drafted"] == 0
        assert not forwards and 5 <= len(looks) <= 9


def test_tokens_per_layer():
    assert tokens_per_layer(0.5, 2, 3, 10) == pytest.approx((1 + 0.5 + 0.25 + 0.125) / 16)
    assert tokens_per_layer(1.0, 2, 3, 10) == pytest.approx(4 / 16)
    assert tokens_per_layer(0.5, 2, 3, 10, head=1) == pytest.approx(1.875 / 20)
    rising = [tokens_per_layer(a / 20, 3, 4, 12) for a in range(21)]
    assert rising == sorted(rising) and len(set(rising)) == 21
    assert best_exit({1: 0.0, 5: 0.0}, 8, 12) == (0, 0)
    assert best_exit({1: 0.05, 5: 0.4}, 8, 12) == (0, 0)  # a guess costs more than it brings
    assert best_exit({1: 0.5, 3: 0.9}, 8, 12) == max(
        ((e, d) for e in (1, 3) for d in range(1, 9)), key=lambda c: tokens_per_layer({1: 0.5, 3: 0.9}[c[0]], *c, 12)
    )


def test_estimates_forget():
    acceptance = Acceptance(0.9)
    assert acceptance.rate(3) == 0
    acceptance.note(3, [True] * 60)
    assert acceptance.rate(3) == pytest.approx(10 / 11, abs=0.01)
    acceptance.note(3, [False] * 30)
    assert acceptance.rate(3) < 0.06
    confidence = Confidence(0.5)
    confidence.note(0.8, True)
    assert confidence.threshold == 0
    confidence.note(0.2, False)
    confidence.note(0.4, False)
    assert confidence.threshold == pytest.approx((0.8 + 0.3) / 2)


def test_an_unsure_guess_ends_its_draft(deep, prompts):
    request = Request(deep, [], False, frozenset())
    drafters = ExitDrafters(request, [2], 6, True, 0.9, True)
    drafters.acceptance.note(2, [True] * 30)
    logits = torch.zeros(1, 24)
    sures = iter([9.0, 9.0, 0.0, 9.0])
    drafters._forward = lambda *args: logits.index_fill(1, torch.tensor([4]), next(sures))
    drafters.runner = type("R", (), {"cache": type("C", (), {"packing": type("P", (), {"grown": [0]})})})
    drafters._last = [3]
    drafters.confidence.note(0.9, True)
    drafters.confidence.note(0.1, False)
    assert len(drafters.propose([10])[0]) == 3


def test_sampling_with_a_seed_is_that_of_plain_sampling(deep, prompts):
    ids = torch.tensor([prompts(0)])
    outs = []
    for plan in ("", "decode=layer_skip(exit=2, adaptive=False)"):
        torch.manual_seed(0)
        with tt.apply(plan, deep):
            outs.append(deep.generate(ids, do_sample=True, max_new_tokens=30).tolist())
    assert outs[0] == outs[1]


def test_drafts_and_a_reduced_cache_compose(deep, prompts):
    ids = torch.tensor([prompts(0, 60), prompts(1, 60)])
    outs = []
    for plan in ("cache=knorm(budget=24)", "cache=knorm(budget=24) decode=layer_skip(exit=2, adaptive=False)"):
        with tt.apply(plan, deep) as session:
            outs.append(deep.generate(ids, do_sample=False, max_new_tokens=30).tolist())
    assert outs[0] == outs[1] and session.records["decode"].extra["accepted"] > 0


def test_the_model_is_whole_again_after_an_error(deep, prompts, monkeypatch):
    before = list(deep.model.layers)
    with (
        tt.apply("decode=layer_skip(exit=2, adaptive=False)", deep),
        monkeypatch.context() as patch,
        pytest.raises(RuntimeError, match="broken"),
    ):
        patch.setattr(
            type(deep.model.layers[1]), "forward", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("broken"))
        )
        deep.generate(torch.tensor([prompts(0)]), max_new_tokens=5)
    assert list(deep.model.layers) == before and not any(m._forward_hooks for m in deep.modules())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("layer_skip(exit=0)", "a share below 1"),
        ("layer_skip(exit=1.5)", "a share below 1"),
        ("layer_skip(draft=0)", "draft of at least 1"),
        ("dynamic_exit(draft=0)", "at least 1"),
        ("dynamic_exit(decay=1.0)", "between 0 and 1"),
    ],
)
def test_bad_parameters(plan, message):
    with pytest.raises(ThriftError, match=message):
        tt.Plan.parse(f"decode={plan}")


def test_models_that_cannot(llama, lfm2, prompts):
    ids = torch.tensor([prompts(0)])
    with tt.apply("decode=layer_skip(exit=2)", llama), pytest.raises(ThriftError, match="the model has 2 layers"):
        llama.generate(ids, max_new_tokens=4)
    with tt.apply("decode=dynamic_exit()", lfm2), pytest.raises(ThriftError, match="cannot be run in part"):
        lfm2.generate(ids, max_new_tokens=4)
    assert "generate" not in vars(llama)
