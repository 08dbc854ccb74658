"""Tiny random models of several architectures, and drafters that make every path of the engine run."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tokenthrift.core.draft import Draft
from tokenthrift.decoding.engine import speculate
from tokenthrift.decoding.protocols import each_row

VOCAB = 24
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 2}),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {}),
    # One sliding layer of 8 tokens, one full layer: prompts and drafts cross the window.
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    # Short convolutions, whose states can be rolled back.
    "lfm2": (
        Lfm2ForCausalLM,
        Lfm2Config,
        {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    ),
    # A recurrent state, which cannot.
    "qwen3_next": (
        Qwen3NextForCausalLM,
        Qwen3NextConfig,
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
    ),
}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Models this small are faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def build(name: str):
    torch.manual_seed(7)
    model, config, extra = ARCHITECTURES[name]
    return model(config(**SMALL, **extra)).eval()


@pytest.fixture(params=["llama", "qwen2", "gpt_neox", "gemma3"])
def model(request):
    return build(request.param)


@pytest.fixture
def llama():
    return build("llama")


@pytest.fixture
def gemma3():
    return build("gemma3")


@pytest.fixture
def lfm2():
    return build("lfm2")


@pytest.fixture
def qwen3_next():
    return build("qwen3_next")


def repetitive_prompt(seed: int, length: int = 24) -> list[int]:
    """Random phrases, some of them repeated with small changes. Tokens 0 and 1 are left for padding and end."""
    rng = random.Random(seed)
    phrases = [[rng.randrange(2, VOCAB) for _ in range(rng.randint(2, 6))] for _ in range(3)]
    out: list[int] = []
    while len(out) < length:
        phrase = list(rng.choice(phrases))
        if rng.random() < 0.2:
            phrase[rng.randrange(len(phrase))] = rng.randrange(2, VOCAB)
        out += phrase
    return out[:length]


@pytest.fixture
def prompts():
    return repetitive_prompt


class Oracle:
    """Drafts the continuation of a known text, with some tokens spoilt: exact verification must undo the damage."""

    def __init__(
        self, text: Sequence[int], spoil: float, width: int, seed: int, prompt: Sequence[int], request=None
    ) -> None:
        self.text, self.spoil, self.width = list(text), spoil, width
        self.rng = random.Random(seed)
        self.length = len(prompt)
        self.proposed: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        self.length += len(tokens)

    def propose(self, limit: int) -> list[int]:
        draft = self.text[self.length : self.length + min(limit, self.width)]
        draft = [self.rng.randrange(VOCAB) if self.rng.random() < self.spoil else t for t in draft]
        self.proposed.append(len(draft))
        return draft


@pytest.fixture
def oracle():
    """``oracle(text, spoil, width)``: a drafter factory."""
    return lambda text, spoil=0.2, width=6, seed=0: partial(Oracle, text, spoil, width, seed)


class TreeOracle(Oracle):
    """The same hidden in a tree: beside every right guess wrong ones, some of them first, some with guesses below."""

    def propose(self, limit: int) -> Draft:
        tokens, parents, node = [], [], -1
        for right in super().propose(limit):
            wrong = [t for t in self.rng.sample(range(VOCAB), 3) if t != right]
            siblings = [*wrong[:1], right, *wrong[1:]] if self.rng.random() < 0.5 else [right, *wrong]
            first = len(tokens)
            tokens += siblings
            parents += [node] * len(siblings)
            other = first + siblings.index(wrong[0])
            node = first + siblings.index(right)
            if self.rng.random() < 0.5:
                tokens.append(self.rng.randrange(VOCAB))
                parents.append(other)
        return Draft(tokens, parents)


@pytest.fixture
def tree_oracle():
    """``tree_oracle(text, spoil, width)``: a factory of drafters of trees."""
    return lambda text, spoil=0.2, width=6, seed=0: partial(TreeOracle, text, spoil, width, seed)


@pytest.fixture
def custom():
    """``custom(factory, ...)``: the engine as ``custom_generate``."""
    return lambda factory, **kwargs: partial(speculate, start=each_row(factory), **kwargs)
