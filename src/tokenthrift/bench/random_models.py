"""Models of random weights, with which text methods run in milliseconds: to try what does not depend on weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ..models.scoring import Embedder, Scorer
from ..models.token_classifier import TokenClassifier
from .fuzzed import prose

WORDS = 800
"""Entries of the vocabulary."""
ANSWERS = ["Was it so? Yes. Or not? No."] * 100
"""So that these words, which a method may ask for, are pieces of their own."""


class RandomModels(NamedTuple):
    """A scorer, an embedder and a classifier of tokens that share a tokenizer."""

    tokenizer: PreTrainedTokenizerFast
    scorer: Scorer
    embedder: Embedder
    classifier: TokenClassifier


def random_models(seed: int = 0) -> RandomModels:
    """The same weights for the same seed, whatever else draws numbers; two layers each."""
    tokenizer = _tokenizer()
    small = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    decoder = LlamaConfig(**small, intermediate_size=16, max_position_embeddings=8192, initializer_range=0.5)
    encoder = BertConfig(
        **small, intermediate_size=16, max_position_embeddings=512, initializer_range=0.5, num_labels=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RandomModels(
            tokenizer,
            Scorer(LlamaForCausalLM(decoder).eval(), tokenizer),
            Embedder(BertModel(encoder).eval(), tokenizer),
            TokenClassifier(BertForTokenClassification(encoder).eval(), tokenizer),
        )


def _tokenizer() -> PreTrainedTokenizerFast:
    """Pieces of bytes, trained on the prose of the made-up documents; encoders get their special tokens by template."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "[PAD]", "[CLS]", "[SEP]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([*prose(), *ANSWERS], trainer)
    around = [(name, inner.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|endoftext|>",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=8192,
    )
