"""A cache that one session filled, reset or not, in the next session of another stage."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

import tokenthrift as tt
from tiny_models import prompt, tiny
from tokenthrift.models.growing import GrowingLayer
from tokenthrift.models.kv import ReducedLayer

PLANS = {
    "nothing": None,
    "cache": "knorm(budget=10)",
    "every": "snapkv(budget=10, window=4, every=3)",
    "ragged": "ada_kv(budget=10, base=knorm)",
    "attention": "quest(budget=12, page=4, dense=0)",
    "heads": "token_sparse_attention(min_tokens=4)",
    "rows": "prepacking",
    "prompt": "gemfilter(budget=10, layer=0)",
    "layers": "lazy_llm(keep=0.4)",
}


def filled(model, plan, cache, inputs, later=6):
    """Logits of a prompt and some tokens after it."""
    with torch.no_grad(), tt.apply(plan, model):
        mask = inputs["attention_mask"]
        out = model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache, use_cache=True)
        logits, cache = [out.logits[:, -1:]], out.past_key_values
        for t in range(later):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            more = {"attention_mask": mask, "position_ids": mask.cumsum(-1)[:, -1:] - 1}
            logits.append(model(torch.full((2, 1), 5 + t), **more, past_key_values=cache).logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("second", PLANS)
@pytest.mark.parametrize("first", ["cache", "every", "ragged", "attention"])
def test_a_reset_cache_serves_any_stage_as_a_new_one_does(first, second):
    model, inputs, other = tiny("llama"), prompt(length=30, pad=4), prompt(length=41, pad=3, seed=1)
    _, cache = filled(model, PLANS[first], DynamicCache(config=model.config), inputs)
    cache.reset()
    assert cache.get_seq_length() == 0
    got, _ = filled(model, PLANS[second], cache, other)
    want, _ = filled(model, PLANS[second], DynamicCache(config=model.config), other)
    torch.testing.assert_close(got, want)


def test_a_full_cache_of_an_attention_session_can_be_reduced():
    """Its layers append in place: by tokens that come later, and as the prompt of a question."""
    model, inputs = tiny("llama"), prompt(length=30, pad=4)
    _, cache = filled(model, PLANS["attention"], DynamicCache(config=model.config), inputs)
    _, plain = filled(model, "quest(budget=400, page=4)", DynamicCache(config=model.config), inputs)
    assert all(type(layer) is GrowingLayer for layer in cache.layers + plain.layers)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 7), value=1)
    dense = DynamicCache(config=model.config)
    for source, target in zip(plain.layers, dense.layers, strict=True):
        target.update(source.keys.clone(), source.values.clone())
    assert all(type(layer) is DynamicLayer for layer in dense.layers)
    with torch.no_grad(), tt.apply("knorm(budget=10, every=1)", model):
        a, b = (
            model(torch.full((2, 1), 9), attention_mask=mask, past_key_values=held).logits for held in (plain, dense)
        )
    assert torch.equal(a, b)
    assert [layer.stored for layer in plain.layers] == [layer.stored for layer in dense.layers] == [10, 10]
    assert all(isinstance(layer, ReducedLayer) for layer in plain.layers)


@pytest.mark.parametrize("first", ["cache", "ragged"])
def test_a_reduced_cache_is_no_full_one(first):
    model, inputs = tiny("llama"), prompt(length=30)
    _, cache = filled(model, PLANS[first], DynamicCache(config=model.config), inputs)
    token = {"input_ids": torch.full((2, 1), 5), "past_key_values": cache}
    with (
        torch.no_grad(),
        tt.apply(PLANS["attention"], model),
        pytest.raises(tt.ThriftError, match=r"layer 0 of this cache was reduced .* empty cache"),
    ):
        model(**token)


def test_a_cache_in_which_tokens_wait_says_that_it_cannot_be_reset():
    model, inputs = tiny("llama"), prompt(length=30, pad=4)
    _, cache = filled(model, PLANS["layers"], DynamicCache(config=model.config), inputs)
    with pytest.raises(tt.ThriftError, match="begin the next prompt with a new one"):
        cache.reset()
