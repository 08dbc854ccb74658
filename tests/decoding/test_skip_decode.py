"""SkipDecode: the model itself where nothing is skipped, and otherwise the layers and the cost of the schedule."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import tokenthrift as tt
from tokenthrift.core.errors import ThriftError
from tokenthrift.decoding.skip_decode import SkipDecode

SMALL = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2}),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {}),
    # Of two kinds in turn, so that a layer taken for its neighbour is wrong.
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
    ),
}


@pytest.fixture(params=list(KINDS), scope="module")
def six(request):
    torch.manual_seed(5)
    model, config, extra = KINDS[request.param]
    return model(config(**SMALL, **extra)).eval()


def padded(prompts):
    rows = [prompts(0, 24), prompts(1, 15)]
    ids = torch.tensor([[0] * (24 - len(r)) + r for r in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(24) >= 24 - torch.tensor([[24], [15]])).long()}


OPTIONS = {"do_sample": False, "max_new_tokens": 11, "pad_token_id": 0}


def test_nothing_skipped_is_the_model(model, prompts):
    for inputs in (padded(prompts), {"input_ids": torch.tensor([prompts(3)])}):
        plain = model.generate(**inputs, **OPTIONS, return_dict_in_generate=True, output_logits=True)
        with tt.apply("decode=skip_decode(least=1.0)", model) as session:
            ours = model.generate(**inputs, **OPTIONS, return_dict_in_generate=True, output_logits=True)
        assert ours.sequences.tolist() == plain.sequences.tolist()
        assert all(torch.equal(a, b) for a, b in zip(ours.logits, plain.logits, strict=True))
        extra = session.records["decode"].extra
        assert extra["layers"] == extra["layers_of_all"] == 11 * model.config.num_hidden_layers


def reference(model, row, made, new):
    """Token by token without a cache: a token's hidden state at a layer that it skips is what it was below. Each layer
    that is active for the last token attends to all tokens, so that it suffices to recompute those before as they
    were: every token with the layers of its own position."""
    layers, body = model.config.num_hidden_layers, model.base_model
    counts = made.schedule(layers, new)
    text, logits = list(row), []
    handles = []

    def gate(index):
        def hook(_module, args, output):
            hidden = args[0]
            skips = torch.tensor([index not in made.active(n, layers) for n in per_token])
            first = output[0] if isinstance(output, tuple) else output
            mixed = torch.where(skips[None, :, None], hidden, first)
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        return hook

    try:
        handles = [layer.register_forward_hook(gate(i)) for i, layer in enumerate(body.layers)]
        for t in range(new):
            # The token at position len(row) + k was fed to produce new token k + 1.
            per_token = [counts[0]] * len(row) + counts[1 : t + 1]
            with torch.no_grad():
                logits.append(model(torch.tensor([text]), use_cache=False).logits[0, -1])
            text.append(int(logits[-1].argmax()))
    finally:
        for handle in handles:
            handle.remove()
    return text, logits


def test_tokens_and_logits_are_those_of_a_loop_that_computes_everything_anew(six, prompts):
    made = SkipDecode(most=6, least=3, warmup=2)
    rows = [prompts(0, 24), prompts(1, 15)]
    inputs = padded(prompts)
    with tt.apply(tt.Plan(decode=made), six):
        out = six.generate(**inputs, **OPTIONS, return_dict_in_generate=True, output_logits=True)
    plain = six.generate(**inputs, **OPTIONS, return_dict_in_generate=True, output_logits=True)
    for i, row in enumerate(rows):
        text, logits = reference(six, row, made, 11)
        assert out.sequences[i].tolist()[-len(text) :] == text
        for ours, theirs in zip(out.logits, logits, strict=True):
            torch.testing.assert_close(ours[i], theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.logits[0], plain.logits[0])
    assert (out.logits[-1] - plain.logits[-1]).abs().max() > 0.02  # a method that skips nothing would be seen


def test_the_cost_is_the_schedules(six, prompts):
    made, ran = SkipDecode(most=6, least=2, warmup=2), []
    handles = [
        layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(six.base_model.layers)
    ]
    try:
        with tt.apply(tt.Plan(decode=made), six) as session:
            six.generate(torch.tensor([prompts(0)]), **OPTIONS)
    finally:
        for handle in handles:
            handle.remove()
    counts = made.schedule(6, 11)
    assert counts[0] == 6 and counts[-1] == 2
    assert ran == [i for n in counts for i in made.active(n, 6)]
    record = session.records["decode"]
    assert (record.extra["layers"], record.extra["layers_of_all"]) == (sum(counts), 66)
    assert record.tokens_before == record.tokens_after == 11
    assert len(six.base_model.layers) == 6 and not six._forward_hooks and not six._forward_pre_hooks


@pytest.mark.parametrize(("most", "least", "warmup"), [(1.0, 0.5, 1), (9, 4, 4), (0.75, 0.25, 2), (12, 1, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_active_layers_are_nested(most, least, warmup, tokens):
    made = SkipDecode(most=most, least=least, warmup=warmup)
    counts = made.schedule(12, tokens)
    sets = [set(made.active(n, 12)) for n in counts]
    assert [len(s) for s in sets] == counts == sorted(counts, reverse=True)
    assert all(later <= earlier for earlier, later in pairwise(sets))
    assert all(set(range(warmup)) <= s for s in sets)
    assert tokens < 2 or counts[-1] == (least if isinstance(least, int) else round(least * 12))


def test_a_model_is_whole_after_an_error(six, prompts):
    with tt.apply("decode=skip_decode(least=2, warmup=2)", six), pytest.raises(RuntimeError, match="stop"):
        six.generate(
            torch.tensor([prompts(0)]),
            logits_processor=[lambda ids, scores: (_ for _ in ()).throw(RuntimeError("stop"))],
            **OPTIONS,
        )
    with (
        tt.apply("decode=skip_decode(least=2, warmup=2)", six),
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(RuntimeError, match="stop"),
    ):
        layer = six.base_model.layers[1]
        patch.setattr(layer, "forward", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("stop")))
        six.generate(torch.tensor([prompts(0)]), **OPTIONS)
    assert len(six.base_model.layers) == 6 and not six._forward_hooks and "generate" not in vars(six)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("skip_decode(most=0)", "needs most"),
        ("skip_decode(least=1.5)", "needs least"),
        ("skip_decode(warmup=0)", "warmup of at least 1"),
    ],
)
def test_bad_parameters(plan, message):
    with pytest.raises(ThriftError, match=message):
        tt.Plan.parse(f"decode={plan}")


def test_bad_calls(llama, gemma3, prompts):
    ids = torch.tensor([prompts(0)])
    for plan, options, message in (
        ("skip_decode(most=3)", {}, "warmup <= least <= most"),
        ("skip_decode(least=1, warmup=2)", {}, "warmup <= least"),
        ("skip_decode()", {"num_beams": 2}, "num_beams"),
        ("skip_decode()", {"use_cache": False}, "use_cache"),
    ):
        with tt.apply(f"decode={plan}", llama), pytest.raises(ThriftError, match=message):
            llama.generate(ids, **OPTIONS, **options)
    with tt.apply("decode=skip_decode(least=1)", gemma3), pytest.raises(ThriftError, match="warmup=2"):
        gemma3.generate(ids, **OPTIONS)
    with tt.apply("decode=skip_decode(least=1)", llama):
        out = llama.generate(ids, **OPTIONS, return_dict_in_generate=True)
        with pytest.raises(ThriftError, match="begin with a new one"):
            llama.generate(out.sequences, past_key_values=out.past_key_values, **OPTIONS)
