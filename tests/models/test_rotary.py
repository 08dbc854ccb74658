"""A layer's rotation is undone, and continued to later positions, as the model itself would."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tokenthrift as tt
from tiny_models import prompt, tiny
from tokenthrift.cache.expected_attention import ExpectedAttention
from tokenthrift.core.tokenmap import TokenMap
from tokenthrift.models.decoder import find_attentions

LAYOUTS = {
    "halves": ("llama", {}),
    "scaled": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "after a norm": ("qwen3", {}),
    "beside sliding layers": ("gemma3_text", {}),
    "part of the channels": ("gpt_neox", {"rotary_pct": 0.5}),
    "interleaved": ("cohere", {}),
    "interleaved in part": ("glm", {}),
    "no rotation in layer 1": ("smollm3", {"no_rope_layers": [1, 0]}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_queries_before_rotation_and_their_future(layout, monkeypatch):
    family, changes = LAYOUTS[layout]
    model, inputs, checked = tiny(family, **changes), prompt(length=30, pad=6), []
    file = sys.modules[type(find_attentions(model)[0]).__module__]
    apply, rotated = file.apply_rotary_pos_emb, []

    @functools.wraps(apply)
    def noted(q, *args, **kwargs):
        rotated.append(q)
        return apply(q, *args, **kwargs)

    def reduce(method, view):
        free = not getattr(find_attentions(model)[view.layer], "use_rope", True)
        want = view.queries if free else rotated[-1]
        torch.testing.assert_close(view.rotary.undo(view.queries), want, atol=1e-5, rtol=1e-5)

        later = torch.arange(8) + view.mask.sum(-1, keepdim=True)  # row 0 has 24 real tokens, row 1 has 30
        types = ["full_attention"] if family == "gemma3_text" else []
        cos, sin = model.base_model.rotary_emb(want, later, *types)
        each = torch.cat(
            [apply(want[:, :, -1:], want[:, :, -1:], cos[:, i : i + 1], sin[:, i : i + 1])[0] for i in range(8)], 2
        )
        mean = want[:, :, -1:] if free else each.mean(2, keepdim=True)
        got = view.rotary.ahead(8, view.mask).apply(want[:, :, -1:])
        torch.testing.assert_close(got, mean, atol=1e-5, rtol=1e-5)
        checked.append(view.layer)
        return TokenMap.identity(view.keys.shape[-2], view.keys.shape[:2])

    monkeypatch.setattr(ExpectedAttention, "reduce", reduce)
    monkeypatch.setattr(file, "apply_rotary_pos_emb", noted)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with tt.apply("expected_attention", model), torch.no_grad():
        model(**inputs, position_ids=positions, use_cache=True)
    assert checked == ([1] if family == "gemma3_text" else [0, 1])


def test_a_layer_without_rotary_embeddings_is_named():
    config = AutoConfig.for_model("gpt2", n_layer=2, n_head=4, n_embd=32, vocab_size=97, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with tt.apply("tova(budget=8)", model), torch.no_grad():
        model(**prompt())
    with tt.apply("expected_attention(budget=8)", model), pytest.raises(tt.ThriftError, match="layer 0"):
        model(**prompt())
