"""Other products of linear layers: the same up to rounding, and no trace left."""

from time import sleep

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tokenthrift as tt
from tokenthrift.models import linears


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


IDS = torch.arange(20).view(2, 10)


@pytest.mark.parametrize("product", ["onednn", "prepacked"])
def test_logits_and_tokens_are_the_same_and_no_trace_is_left(model, product):
    before = [dict(vars(m)) for m in model.modules()]
    with torch.no_grad():
        plain, text = model(IDS).logits, model.generate(IDS, max_new_tokens=20, do_sample=False)
        with tt.apply(None, model, linears=product) as session:
            torch.testing.assert_close(model(IDS).logits, plain, rtol=1e-4, atol=1e-5)
            assert "forward" in vars(model.lm_head)
            assert model.generate(IDS, max_new_tokens=20, do_sample=False).tolist() == text.tolist()
        with tt.apply("decode=prompt_lookup(adaptive=False)", model, linears=product):
            assert model.generate(IDS, max_new_tokens=20, do_sample=False).tolist() == text.tolist()
    weights = {m.weight.data_ptr(): m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear)}
    assert session.linears == product
    assert session.copied_bytes == (sum(weights.values()) if product == "prepacked" else 0)
    assert [dict(vars(m)) for m in model.modules()] == before


@pytest.mark.parametrize("product", ["onednn", "prepacked"])
def test_changed_weights_and_gradients_are_respected(model, product):
    with tt.apply(None, model, linears=product):
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


def test_auto_takes_what_is_faster_and_only_to_decode(model, monkeypatch):
    with tt.apply("decode=prompt_lookup()", model) as session:
        assert session.linears == "torch"  # weights are too small to matter
    monkeypatch.setattr(linears, "WORTH_MEASURING", 0)
    for faster in (True, False):
        monkeypatch.setattr(linears, "_measured", {})
        # of several shapes one at most
        monkeypatch.setattr(linears, "_onednn_is_faster", lambda w, x, f=faster: f and w[0].shape == (48, 32))
        with tt.apply("decode=prompt_lookup()", model) as session:
            assert session.linears == ("onednn" if faster else "torch")
            mlp = model.model.layers[0].mlp
            assert ["forward" in vars(m) for m in (mlp.up_proj, mlp.down_proj, model.lm_head)] == [faster, False, False]
        with tt.apply("cache=knorm(budget=0.5)", model) as session:
            assert session.linears == "torch"
            assert "forward" not in vars(mlp.up_proj)


def test_the_faster_product_is_measured(monkeypatch):
    weights = [torch.randn(512, 512) for _ in range(2)]
    for slow, faster in (("linear", True), ("_multiply", False)):
        with monkeypatch.context() as patch:
            product = getattr(linears, slow)
            patch.setattr(linears, slow, lambda *args, product=product: (sleep(0.05), product(*args))[1])
            assert linears._onednn_is_faster(weights, torch.zeros(8, 512)) is faster


@pytest.mark.parametrize("product", ["onednn", "prepacked"])
def test_a_model_without_such_layers_is_refused(model, product):
    with pytest.raises(tt.ThriftError, match="use 'torch'"):
        tt.apply(None, model.to(torch.bfloat16), linears=product).install()


def test_unknown_products_are_refused(model):
    with pytest.raises(tt.ThriftError, match="did you mean 'onednn'"):
        tt.apply(None, model, linears="onednnn").install()
