"""Tiny random models of every supported decoder family, float32, grouped-query attention where there is one."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 8,
    },
    "phi3": {},
    "gpt_neox": {"rotary_pct": 1.0},
    "olmo": {},
}


def tiny(family: str, attention: str = "sdpa", seed: int = 0, **changes: object) -> AutoModelForCausalLM:
    """A random model of the family; weights are scaled up so that attention is far from uniform."""
    values = {**_COMMON, **FAMILIES.get(family, {}), **changes}
    if family == "gpt_neox":  # multi-head attention: it has no such settings
        values = {k: v for k, v in values.items() if k not in ("num_key_value_heads", "head_dim")}
    config = AutoConfig.for_model(family, **values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
    return model


def prompt(batch: int = 2, length: int = 40, pad: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ids; row 0 has ``pad`` padding tokens on its left."""
    ids = torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[0, :pad], mask[0, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, n=6, **kwargs):
    """So many tokens, greedily."""
    return model.generate(**inputs, max_new_tokens=n, do_sample=False, **kwargs)


def fingerprint(model):
    """Everything on a model that a session could have left behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    per_module = [(name, sorted(m.__dict__), [len(getattr(m, h)) for h in hooks]) for name, m in model.named_modules()]
    return per_module, model.config.to_dict(), model.config._attn_implementation, model.generation_config.to_dict()
