"""What the tests of draft models share: a model that often agrees with its target, and words for the tokens."""

from __future__ import annotations

import copy
import functools

import torch
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import tokenthrift as tt
from decoding.conftest import VOCAB, build, repetitive_prompt
from tokenthrift.core.plan import Plan

WORDS = [f"word{i}" for i in range(VOCAB)]


@functools.cache
def near(name: str, noise: float = 0.02):
    """A model that often agrees with the fixture of this name."""
    model = copy.deepcopy(build(name))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * torch.randn_like(weight)
    return model


def padded(lengths=(24, 17, 9)):
    rows = [repetitive_prompt(seed, length) for seed, length in enumerate(lengths)]
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = (torch.arange(width) >= width - torch.tensor([[n] for n in lengths])).long()
    return {"input_ids": ids, "attention_mask": mask, "pad_token_id": 0}


def run(method, target, inputs, **options):
    """The tokens, and the decode stage's record."""
    with tt.apply(Plan(decode=method), target) as session:
        out = target.generate(**inputs, **options)
    return out.tolist(), session.records["decode"]


def tokenizer(strings):
    vocab = {string: token for token, string in enumerate(strings)}
    words = Tokenizer(models.WordLevel(vocab, unk_token=strings[0]))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)
