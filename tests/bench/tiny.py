"""A random Llama of 60k parameters with a tokenizer of bytes, saved like any model; and a suite that takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokenthrift.bench.tasks import Suite

SUITE = Suite("tiny", 2, 700, 12, 2, 2, 200, 2, 60, 6, 2)


def tiny_tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def tiny_model(context: int = 2048, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, eos_token_id=256, bos_token_id=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def save_tiny(folder: Path, context: int = 2048) -> Path:
    tiny_model(context).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def a_text(words: int = 900) -> str:
    """Real prose: the Python documentation."""
    from pydoc_data.topics import topics

    return " ".join(topics["execmodel"].split(" ")[:words])
