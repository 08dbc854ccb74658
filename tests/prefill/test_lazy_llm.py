"""LazyLLM against a plain restatement of it: dense layers, of which only the rows that are computed are used."""

from __future__ import annotations

import copy

import pytest
import torch

import tokenthrift as tt
from tiny_models import prompt, tiny

FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt_neox", "olmo", "phi3"])
BOTH = pytest.mark.parametrize("attention", ["sdpa", "eager"])
PLAN = "prefill=lazy_llm(keep=0.3, layers=[0, 2])"


def made(family, attention="sdpa"):
    return tiny(family, attention, num_hidden_layers=5)


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, **{"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **kwargs})


class Reference:
    """Of every layer what went into it, token by token, when it was computed; keys and values follow from that."""

    def __init__(self, model, ends):
        self.model, self.ends = model, ends
        self.inputs = [torch.zeros(0, 48) for _ in model.model.layers]
        self.outputs = [torch.zeros(0, 48) for _ in model.model.layers]
        self.done = [torch.zeros(0, dtype=torch.bool) for _ in model.model.layers]

    @torch.no_grad()
    def forward(self, ids, share):
        old, n = len(self.done[0]), len(self.done[0]) + len(ids)
        grow = torch.nn.functional.pad
        self.inputs = [grow(t, (0, 0, 0, len(ids))) for t in self.inputs]
        self.outputs = [grow(t, (0, 0, 0, len(ids))) for t in self.outputs]
        self.done = [grow(t, (0, len(ids))) for t in self.done]
        self.n_prompt = n if not old else self.n_prompt
        body = self.model.model
        turns = body.rotary_emb(torch.zeros(1, n, 48), position_ids=torch.arange(n)[None])
        wanted = torch.ones(n, dtype=torch.bool)
        below = torch.zeros(n, 48)
        below[old:] = body.embed_tokens(ids)
        chosen = []
        for i, layer in enumerate(body.layers):
            fresh = wanted & ~self.done[i]
            self.inputs[i][fresh] = below[fresh]
            self.done[i] |= fresh
            mask = torch.ones(n, n, dtype=torch.bool).tril() & wanted
            mask = torch.zeros(n, n).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
            weights = []
            hook = layer.self_attn.register_forward_hook(lambda _m, _i, out, to=weights: to.append(out[1]))
            out = layer(self.inputs[i][None], attention_mask=mask, position_embeddings=turns)[0]
            hook.remove()
            self.outputs[i][fresh] = out[fresh]
            below = self.outputs[i]
            if i in self.ends:
                scores = weights[0][0, :, -1].mean(0)
                scores[self.n_prompt if old else -1 :] = torch.inf
                scores[~wanted] = -torch.inf
                keep = int(int(wanted.sum()) * share + 0.5)
                wanted = torch.zeros_like(wanted).index_fill_(0, scores.topk(keep).indices, True)
                chosen.append(wanted)
        return self.model.lm_head(body.norm(below[-1])), chosen


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_prefill_and_decoding_are_those_of_the_plain_restatement(family):
    """Twelve forwards, one of several tokens: what is left behind is computed later, where a later token asks."""
    model, ids = made(family), prompt(batch=1, length=40)["input_ids"]
    dense = made(family, "eager")
    reference, share = Reference(dense, [0, 2]), 0.3**0.5
    with tt.apply(PLAN, model) as session, torch.no_grad():
        cache = None
        for step in range(12):
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            want, _ = reference.forward(ids[0], share)
            torch.testing.assert_close(out.logits[0, -1], want, atol=2e-4, rtol=2e-4)
            known = cache.layers[0].lazy.known
            assert torch.equal(known[1][0], reference.done[1][:40])
            assert torch.equal(known[2][0], reference.done[4][:40])
            ids = out.logits[:, -1:].argmax(-1) if step != 5 else prompt(batch=1, length=3, seed=2)["input_ids"]
    record = session.report().stages["prefill"]
    assert record.extra["revived"] > 10  # or nothing was tested
    assert record.tokens_before == 2 * 40
    assert cache.get_seq_length() == 53


def test_flops_are_those_of_what_is_computed():
    model, inputs = made("llama"), prompt(batch=1, length=40)
    with tt.apply(PLAN, model) as session, torch.no_grad():
        model(**inputs)
    sizes = [40, *(map.n_out for map in session._chains["prefill"])]
    per_layer = [sizes[0], sizes[1], sizes[1], sizes[2], sizes[2]]
    linear = session.adapter.costs.per_token / 5
    saved = sum((40 - k) * linear + 4 * 6 * 8 * (40**2 - k**2) for k in per_layer)
    assert session.flops_dense - session.flops == pytest.approx(saved)
    assert session.provenance()["prefill"].n_out == sizes[-1] == 12


def test_provenance_is_what_the_last_layers_know():
    model = made("llama")
    with tt.apply(PLAN, model) as session, torch.no_grad():
        cache = model(**prompt(length=40, pad=13), use_cache=True).past_key_values
    assert session.provenance()["prefill"].kept.equal(cache.layers[4].lazy.known[2])


@FAMILIES
@BOTH
def test_keeping_everything_is_bit_identical_and_leaves_no_trace(family, attention):
    model, inputs = made(family, attention), prompt(pad=5)
    before = [sorted(vars(m)) for m in model.modules()], model.config._attn_implementation
    tokens, logits = generate(model, inputs), model(**inputs).logits
    with tt.apply("lazy_llm(keep=1.0, layers=[0, 2])", model):
        assert torch.equal(generate(model, inputs), tokens)
        assert torch.equal(model(**inputs).logits, logits)
    with pytest.raises(RuntimeError, match="inside"), tt.apply(PLAN, model):
        assert not torch.equal(model(**inputs, logits_to_keep=1).logits, logits[:, -1:])
        raise RuntimeError("inside")
    assert ([sorted(vars(m)) for m in model.modules()], model.config._attn_implementation) == before
    assert torch.equal(model(**inputs).logits, logits)


@FAMILIES
@BOTH
def test_a_padded_row_generates_what_it_generates_alone(family, attention):
    model, inputs = made(family, attention), prompt(length=40, pad=13)
    with tt.apply(PLAN, model):
        out = generate(model, inputs)
        for row, pad in enumerate((13, 0)):
            alone = generate(model, {k: v[row : row + 1, pad:] for k, v in inputs.items()})
            assert torch.equal(out[row, pad:], alone[0])


def test_copies_beams_and_logits_of_all_positions_work():
    model, inputs = made("llama"), prompt(length=30)
    with tt.apply(PLAN, model), torch.no_grad():
        first = model(**inputs, use_cache=True)
        assert first.logits.shape == (2, 30, 97)
        last = model(**inputs, logits_to_keep=1).logits
        torch.testing.assert_close(first.logits[:, -1:], last)
        token, copied = last.argmax(-1), copy.deepcopy(first.past_key_values)
        once = model(token, past_key_values=first.past_key_values).logits
        assert torch.equal(model(token, past_key_values=copied).logits, once)
        one_beam = generate(model, inputs)
        assert generate(model, inputs, num_beams=3).shape == one_beam.shape


@pytest.mark.parametrize("wrong", ["keep=0.0", "keep=1.5", "layers=[2, 1]", "layers=[]", "layers=[-1]"])
def test_impossible_parameters_are_refused_in_one_line(wrong):
    with pytest.raises(tt.ThriftError) as error:
        tt.Plan.parse(f"lazy_llm({wrong})")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "plan", "words"),
    [
        ("llama", "lazy_llm(layers=[4])", "below the last layer"),
        ("llama", "lazy_llm() cache=knorm()", "leave out cache"),
        ("llama", "lazy_llm() decode=prompt_lookup()", "leave out cache=... and decode"),
        ("gemma3_text", "lazy_llm()", "full attention"),
    ],
)
def test_plans_that_cannot_run_are_refused(family, plan, words):
    model = tiny(family) if family == "gemma3_text" else made(family)
    with pytest.raises(tt.ThriftError, match=words), tt.apply(plan, model):
        pass
