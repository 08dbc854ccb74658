"""Analytic costs against what torch counts, and against the bytes of a real cache, on tiny random models."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from tokenthrift.core.costs import DecoderCosts, attention_flops, kv_bytes, linear_flops

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
MODELS = {
    "llama": GROUPED,
    "llama-wide-heads": {"num_key_value_heads": 1, "head_dim": 24},
    "llama-tied": {**GROUPED, "tie_word_embeddings": True},
    "qwen2": GROUPED,
    "qwen2-sliding": {**GROUPED, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "gemma3_text": {
        **GROUPED,
        "head_dim": 16,
        "sliding_window": 6,
        "sliding_window_pattern": 3,
        "num_hidden_layers": 4,
    },
    "mistral": {**GROUPED, "sliding_window": 6},
    "phi3": GROUPED,
    "gpt_neox": {},
    "olmo": GROUPED,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    kind = request.param.split("-")[0]
    config = AutoConfig.for_model(kind, **{**TINY, **MODELS[request.param]})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@torch.no_grad()
def counted(model, tokens, **inputs):
    with FlopCounterMode(display=False) as counter:
        out = model(torch.full((1, tokens), 3), **inputs)
    return counter.get_total_flops(), out


@pytest.mark.parametrize("logits", [None, 1])
def test_prefill_flops_are_what_torch_counts(model, logits):
    flops, out = counted(model, 10, logits_to_keep=logits or 0)
    assert out.logits.shape[1] == (logits or 10)
    expected = DecoderCosts.of(model).flops(10, 10, logits)
    # Rotary embeddings are a tiny matrix product too.
    assert expected == pytest.approx(flops, rel=0.01) and expected <= flops


def test_decode_flops_are_what_torch_counts(model):
    costs = DecoderCosts.of(model)
    past = counted(model, 10)[1].past_key_values
    for length in (11, 12):
        flops, out = counted(model, 1, past_key_values=past)
        past = out.past_key_values
        assert costs.flops(1, length) == pytest.approx(flops, rel=0.01)
    flops, _ = counted(model, 5, past_key_values=past, logits_to_keep=1)
    assert costs.flops(5, 17, 1) == pytest.approx(flops, rel=0.01)


@torch.no_grad()
def test_kv_bytes_are_those_of_the_cache(model):
    for tokens in (1, 4, 5, 6, 7, 20):  # around a window of 6
        cache = model(torch.full((2, tokens), 3)).past_key_values
        assert isinstance(cache, DynamicCache)
        held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        assert DecoderCosts.of(model).kv_bytes(tokens, 4, batch=2) == sum(t.nbytes for t in held)
        assert DecoderCosts.of(model).kv_bytes(tokens, 2) * 4 == sum(t.nbytes for t in held)


def test_costs_by_hand():
    costs = DecoderCosts(layers=2, heads=4, kv_heads=2, head_dim=8, per_token=1000, per_logit=10)
    assert costs.flops(3, 5) == 3 * 1000 + 2 * 4 * 3 * 5 * 4 * 8 + 3 * 10
    assert costs.flops(3, 5, 1) == costs.flops(3, 5) - 2 * 10
    assert costs.flops(3, [5, 5]) == costs.flops(3, 5)
    assert costs.flops(1, [7, 3]) == 1000 + 4 * 10 * 4 * 8 + 10
    assert costs.kv_bytes(5, 2) == 2 * 2 * 2 * 5 * 8 * 2
    sliding = DecoderCosts(2, 4, 2, 8, 1000, 10, windows=(4, None))
    assert sliding.flops(1, 10) == costs.flops(1, [4, 10])
    assert sliding.flops(10, 10) == costs.flops(10, 10)
    assert sliding.flops(2, 10) == costs.flops(2, [5, 10])
    assert sliding.kv_bytes(10, 2) == kv_bytes(3, 2, 8, 2) + kv_bytes(10, 2, 8, 2)


def test_parts():
    layer = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2, bias=False), nn.LayerNorm(2), nn.Embedding(7, 2))
    assert linear_flops(layer) == 2 * (15 + 10)
    assert linear_flops(layer, 4) == 4 * linear_flops(layer)
    assert attention_flops(3, 5, 4, 8) == 2 * (2 * 3 * 5 * 8 * 4)
    assert kv_bytes(5, 2, 8, 2, layers=3, batch=4) == 4 * 3 * 2 * (2 * 5 * 8) * 2
