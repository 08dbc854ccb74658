"""Products with weights arranged beforehand: the same up to rounding, and no trace left."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tokenthrift as tt


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


IDS = torch.arange(20).view(2, 10)


def test_logits_and_tokens_are_the_same_and_no_trace_is_left(model):
    before = [dict(vars(m)) for m in model.modules()]
    with torch.no_grad():
        plain, text = model(IDS).logits, model.generate(IDS, max_new_tokens=20, do_sample=False)
        with tt.apply(None, model, prepack=True) as session:
            torch.testing.assert_close(model(IDS).logits, plain, rtol=1e-4, atol=1e-5)
            assert "forward" in vars(model.lm_head)
            assert model.generate(IDS, max_new_tokens=20, do_sample=False).tolist() == text.tolist()
        with tt.apply("decode=prompt_lookup(adaptive=False)", model, prepack=True):
            assert model.generate(IDS, max_new_tokens=20, do_sample=False).tolist() == text.tolist()
    linears = {m.weight.data_ptr(): m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear)}
    assert session.prepacked_bytes == sum(linears.values())
    assert [dict(vars(m)) for m in model.modules()] == before


def test_changed_weights_and_gradients_are_respected(model):
    with tt.apply(None, model, prepack=True):
        out = model(IDS).logits
        out.sum().backward()
        assert model.lm_head.weight.grad is not None
        with torch.no_grad():
            before = model(IDS).logits
            model.model.layers[0].mlp.down_proj.weight.mul_(2)
            after = model(IDS).logits
    with torch.no_grad():
        torch.testing.assert_close(after, model(IDS).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, after)


def test_what_cannot_be_prepacked_says_so(model):
    with pytest.raises(tt.ThriftError, match="leave it out"), tt.apply(None, model.to(torch.bfloat16), prepack=True):
        pass
