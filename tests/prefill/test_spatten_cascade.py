"""SpAtten's cascade against a plain restatement of it: dense layers, masked, of which only what is left is used."""

from __future__ import annotations

import copy

import pytest
import torch

import tokenthrift as tt
from tiny_models import fingerprint, generate, prompt, tiny
from tokenthrift.models.cascade_stage import CascadeLayer
from tokenthrift.models.kv import ReducedLayer
from tokenthrift.prefill.spatten_cascade import SpAttenCascade

FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt_neox", "olmo", "phi3"])
BOTH = pytest.mark.parametrize("attention", ["sdpa", "eager"])
TOKENS = "prefill=spatten_cascade(keep=0.3, layers=[1, 3, 6])"
HEADS = "prefill=spatten_cascade(keep=0.3, layers=[1, 3, 6], heads=0.5)"
LEFT, HEADS_LEFT = [40, 40, 31, 31, 21, 21, 21, 12], [6, 6, 6, 6, 6, 6, 5, 3]
ALL = "prefill=spatten_cascade(keep=0.3, layers=[1, 3, 6], heads=0.5, values=0.5, threshold=0.5)"


def made(family, attention="sdpa"):
    return tiny(family, attention, num_hidden_layers=8)


def method(plan):
    return tt.Plan.parse(plan).at("prefill")[0]


class Reference:
    """A dense eager model that runs everything, hides what is gone, and sums up from its own attention matrices."""

    def __init__(self, model, plan):
        self.model, method_ = model, method(plan)
        self.token_ends, self.head_ends = method_.token_shares(8), method_.head_shares(8)
        self.left, self.heads, self.importance = None, None, []

    @torch.no_grad()
    def forward(self, ids):
        """Logits of a prompt the first time, and then of ever longer texts that begin with it."""
        body, n = self.model.model, len(ids)
        first = self.left is None
        if first:
            self.n, self.left, self.heads = n, [], []
        later = torch.ones(n - self.n, dtype=torch.bool)
        left, heads = torch.ones(n, dtype=torch.bool), torch.ones(6)
        importance, magnitude = torch.zeros(n), torch.zeros(6)
        turns = body.rotary_emb(torch.zeros(1, n, 48), position_ids=torch.arange(n)[None])
        hidden, out = body.embed_tokens(ids)[None], torch.zeros(n, 48)
        for i, layer in enumerate(body.layers):
            if not first:
                left, heads = torch.cat([self.left[i], later]), self.heads[i]
            else:
                self.left.append(left)
                self.heads.append(heads)
            mask = torch.ones(n, n, dtype=torch.bool).tril() & left
            mask = torch.zeros(n, n).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
            seen = {}

            def cut(_m, args, heads=heads, seen=seen):
                seen["out"] = args[0][0].unflatten(-1, (6, 8)) * heads[:, None]
                return (seen["out"].flatten(-2)[None],)

            hooks = [
                layer.self_attn.o_proj.register_forward_pre_hook(cut),
                layer.self_attn.register_forward_hook(lambda _m, _i, out, seen=seen: seen.update(weights=out[1])),
            ]
            hidden = layer(hidden, attention_mask=mask, position_embeddings=turns)
            for hook in hooks:
                hook.remove()
            out[left] = hidden[0, left]
            importance += (seen["weights"][0] * heads[:, None, None])[:, left].sum((0, 1))
            magnitude += seen["out"][left].abs().sum((0, 2))
            if first and i in self.head_ends:
                best = magnitude.masked_fill(heads == 0, -1).topk(int(6 * self.head_ends[i] + 0.5)).indices
                heads = torch.zeros(6).index_fill_(0, best, 1)
            if first and i in self.token_ends:
                self.importance.append(importance[left])
                score = importance.masked_fill(~left, -1)
                score[-1] = torch.inf
                keep = int(n * self.token_ends[i] + 0.5)
                left = torch.zeros(n, dtype=torch.bool).index_fill_(0, score.topk(keep).indices, True)
        return self.model.lm_head(body.norm(out))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("plan", [TOKENS, HEADS])
def test_prefill_and_decoding_are_those_of_the_plain_restatement(family, plan, monkeypatch):
    """Eight forwards, one of several tokens."""
    importance, reduce = [], SpAttenCascade.reduce
    monkeypatch.setattr(SpAttenCascade, "reduce", lambda s, v: (importance.append(v.importance[0]), reduce(s, v))[1])
    model, ids = made(family), prompt(batch=1, length=40)["input_ids"]
    reference, text, cache = Reference(made(family, "eager"), plan), ids, None
    with tt.apply(plan, model), torch.no_grad():
        for step in range(8):
            out = model(ids, past_key_values=cache, use_cache=True)
            cache, want = out.past_key_values, reference.forward(text[0])
            torch.testing.assert_close(out.logits[0], want[-ids.shape[1] :], atol=2e-4, rtol=2e-4)
            ids = out.logits[:, -1:].argmax(-1) if step != 3 else prompt(batch=1, length=3, seed=2)["input_ids"]
            text = torch.cat([text, ids], 1)
    torch.testing.assert_close(importance, reference.importance, atol=1e-3, rtol=1e-4)
    for layer, left, heads in zip(cache.layers, reference.left, reference.heads, strict=True):
        if isinstance(layer, CascadeLayer):
            assert layer.map.kept[0, 0, :40].equal(left)
            assert layer.heads is None or layer.heads[0].tolist() == heads.nonzero()[:, 0].tolist()
    assert [int(left.sum()) for left in reference.left] == LEFT
    if plan == HEADS:
        assert [int(h.sum()) for h in reference.heads] == HEADS_LEFT
    assert cache.get_seq_length() == text.shape[1] - 1


def test_the_layers_hold_what_is_left_and_nothing_else():
    """Each layer's tokens are among those of the layer before; padding goes, the last token stays."""
    model, inputs = made("llama"), prompt(length=40, pad=13)
    with tt.apply(HEADS, model) as session, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    assert [layer.get_seq_length() for layer in cache.layers] == [40] * 8
    assert [layer.keys.shape[2] for layer in cache.layers] == LEFT
    real = inputs["attention_mask"].bool()
    before, counts = real, []
    for layer in cache.layers[2:]:
        assert isinstance(layer, ReducedLayer)
        kept = layer.map.kept[:, 0]
        assert not (kept & ~before).any() and kept[:, -1].all()
        assert (layer.real is None and kept.all()) or layer.real[:, 0].sum(1).equal(kept.sum(1))
        before = kept
        counts.append(kept.sum(1).tolist())
    assert counts == [[21, 31]] * 2 + [[14, 21]] * 3 + [[8, 12]]
    assert session.provenance()["prefill"].kept.equal(before)
    record = session.report().stages["prefill"]
    assert (record.tokens_before, record.tokens_after) == (8 * 67, 2 * 67 + 2 * 52 + 3 * 35 + 20)
    assert (record.bytes_before, record.bytes_after) == (2 * 2 * 2 * 8 * 4 * 320, 2 * 2 * 2 * 8 * 4 * sum(LEFT))
    assert record.bytes_after == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert record.extra["heads_left"] == 3


def test_flops_are_those_of_what_is_computed():
    model, inputs = made("llama"), prompt(batch=1, length=40)
    with tt.apply(HEADS, model) as session, torch.no_grad():
        cache = model(**inputs).past_key_values
        prefill = session.flops_dense - session.flops
        model(inputs["input_ids"][:, :1], past_key_values=cache)
    linear = session.adapter.costs.per_token / 8
    layers = list(zip(LEFT, HEADS_LEFT, strict=True))
    saved = sum((40 - k) * linear + 4 * 8 * (6 * 40**2 - h * k**2) for k, h in layers)
    assert prefill == pytest.approx(saved)
    step = sum(4 * 8 * (6 * 41 - h * (k + 1)) for k, h in layers)
    assert session.flops_dense - session.flops - prefill == pytest.approx(step)


def test_shares_are_those_of_the_authors_workload():
    """GPT-2 medium on WikiText-2: tokens of 1,024 after layers 1, 2, 4 and 10, heads of 16 after 15 and 21 of 24."""
    cascade = method("spatten_cascade(keep=0.3, heads=0.625)")
    tokens = {end: 1024 * share for end, share in cascade.token_shares(24).items()}
    assert tokens == pytest.approx({1: 921.6, 2: 819.2, 4: 614.4, 10: 307.2})
    assert {end: 16 * share for end, share in cascade.head_shares(24).items()} == {15: 13, 21: 10}
    assert cascade.token_shares(30) == pytest.approx({1: 0.9, 2: 0.8, 5: 0.6, 12: 0.3})
    assert cascade.token_shares(2) == pytest.approx({0: 0.3})
    assert cascade.token_shares(1) == {}


@FAMILIES
@BOTH
def test_keeping_everything_is_bit_identical_and_leaves_no_trace(family, attention):
    model, inputs = made(family, attention), prompt(pad=5)
    before = fingerprint(model)
    tokens, logits = generate(model, inputs), model(**inputs).logits
    for nothing in ("keep=1.0", "keep=0.999, layers=[1, 3, 6]"):
        with tt.apply(f"spatten_cascade({nothing})", model):
            assert torch.equal(generate(model, inputs), tokens)
            assert torch.equal(model(**inputs).logits, logits)
    with pytest.raises(RuntimeError, match="inside"), tt.apply(ALL, model):
        assert not torch.equal(model(**inputs, logits_to_keep=1).logits, logits[:, -1:])
        raise RuntimeError("inside")
    assert fingerprint(model) == before
    assert torch.equal(model(**inputs).logits, logits)


@FAMILIES
@BOTH
def test_a_padded_row_generates_what_it_generates_alone(family, attention):
    model, inputs = made(family, attention), prompt(length=40, pad=13)
    for plan in (TOKENS, ALL):
        with tt.apply(plan, model):
            out = generate(model, inputs, 8, min_new_tokens=8)
            for row, pad in enumerate((13, 0)):
                alone = generate(model, {k: v[row : row + 1, pad:] for k, v in inputs.items()}, 8, min_new_tokens=8)
                assert torch.equal(out[row, pad:], alone[0])


def test_later_tokens_read_fewer_values_and_bits():
    model, inputs = made("llama"), prompt(length=40, pad=13)
    outs = {}
    with torch.no_grad():
        for option in ("", ", values=0.3", ", threshold=0.0", ", threshold=1.0", ", values=0.999, threshold=1.0"):
            with tt.apply(f"spatten_cascade(keep=0.3, layers=[1, 3, 6]{option})", model) as session:
                first = model(**inputs, use_cache=True)
                token = first.logits[:, -1:].argmax(-1)
                mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
                outs[option] = model(token, attention_mask=mask, past_key_values=first.past_key_values).logits
            outs[option, "prompt"] = first.logits
            if "threshold" in option:
                extra = session.report().stages["prefill"].extra
                assert extra["key_reads"] == 8 * 2 * 6
                assert extra["key_reads_of_all_bits"] == (0 if "0.0" in option else 8 * 2 * 6)
    plain = outs[""]
    error = {option: (out - plain).norm() / plain.norm() for option, out in outs.items() if isinstance(option, str)}
    assert error[", values=0.3"] > 1e-3
    assert 0 < error[", threshold=1.0"] < error[", threshold=0.0"]
    assert all(torch.equal(outs[option, "prompt"], outs["", "prompt"]) for option in error)  # only later tokens


def test_copies_beams_chunks_and_logits_of_all_positions_work():
    model, inputs = made("llama"), prompt(length=30)
    with tt.apply(HEADS, model), torch.no_grad():
        first = model(**inputs, use_cache=True)
        assert first.logits.shape == (2, 30, 97)
        last = model(**inputs, logits_to_keep=1, use_cache=False)
        assert last.past_key_values is None
        torch.testing.assert_close(first.logits[:, -1:], last.logits)
        token, copied = last.logits.argmax(-1), copy.deepcopy(first.past_key_values)
        once = model(token, past_key_values=first.past_key_values).logits
        assert torch.equal(model(token, past_key_values=copied).logits, once)
        swapped = copy.deepcopy(copied)
        swapped.reorder_cache(torch.tensor([1, 0]))
        again = model(token.flip(0), past_key_values=swapped).logits.flip(0)
        torch.testing.assert_close(again, model(token, past_key_values=copied).logits)
        one_beam = generate(model, inputs, 8, min_new_tokens=8)
        assert generate(model, inputs, 8, min_new_tokens=8, num_beams=3).shape == one_beam.shape
        assert generate(model, inputs, 8, min_new_tokens=8, prefill_chunk_size=16).shape == one_beam.shape


@pytest.mark.parametrize(
    "wrong",
    [
        "keep=0.0",
        "keep=1.5",
        "heads=0.0",
        "values=2.0",
        "threshold=-0.1",
        "threshold=1.5",
        "layers=[2, 1]",
        "layers=[]",
        "layers=[-1]",
    ],
)
def test_impossible_parameters_are_refused_in_one_line(wrong):
    with pytest.raises(tt.ThriftError) as error:
        tt.Plan.parse(f"spatten_cascade({wrong})")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "plan", "words"),
    [
        ("llama", "spatten_cascade(layers=[7])", "below the last layer"),
        ("llama", "spatten_cascade() cache=spatten()", "leave out cache"),
        ("llama", "spatten_cascade() decode=prompt_lookup()", "decode=..."),
        ("llama", "spatten_cascade() attention=quest()", "attention=..."),
        ("gemma3_text", "spatten_cascade()", "full attention"),
    ],
)
def test_plans_that_cannot_run_are_refused(family, plan, words):
    model = tiny(family) if family == "gemma3_text" else made(family)
    before = fingerprint(model)
    with pytest.raises(tt.ThriftError, match=words), tt.apply(plan, model):
        pass
    assert fingerprint(model) == before
