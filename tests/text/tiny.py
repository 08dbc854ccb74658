"""A byte-level tokenizer trained in memory, a random language model for it, and a hashing embedder."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tokenthrift.models.scoring import Scorer
from tokenthrift.models.token_classifier import TokenClassifier
from tokenthrift.models.word_head import WordHead, WordScorer

PROSE = """Mr. Hale moved to Lisbon in 1998. He did not like the heat, but he stayed for eleven years!
The rent was $412.50 a month; his sister Ana paid half of it. "Was it worth it?" she asked him once.

Nobody remembers the answer. The house at 14 Rua Nova was sold for 310,000 euros in 2011 (see https://example.org/a?b=1).
- The keys are with the porter.
- The password of the safe is blue-heron-77.
"""


SIZES = {
    "vocab_size": 400,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.5,
}
"""Of the models that share the tokenizer."""


@cache
def tokenizer(special: bool = True) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator([PROSE] * 4, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>"} if special else {}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


@cache
def language_model(positions: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, max_position_embeddings=positions)
    return LlamaForCausalLM(config).eval()


@cache
def scorer() -> Scorer:
    return Scorer(language_model(), tokenizer())


@cache
def classifier(positions: int = 64) -> TokenClassifier:
    """A random token classifier that shares the tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(**SIZES, max_position_embeddings=positions, num_labels=2)
    return TokenClassifier(BertForTokenClassification(config).eval(), tokenizer())


@cache
def sequence_classifier() -> tuple[AutoModelForSequenceClassification, PreTrainedTokenizerFast]:
    """A random BERT of two labels, and a word-piece tokenizer for it."""
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    pieces.train_from_iterator([PROSE], trainers.WordPieceTrainer(vocab_size=150, special_tokens=special))
    around = [("[CLS]", 2), ("[SEP]", 3)]
    pieces.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=160,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    return model, PreTrainedTokenizerFast(tokenizer_object=pieces, **names)


@cache
def word_scorer(positions: int = 64) -> WordScorer:
    """A random head on a random BERT that shares the tokenizer of the language model, which has no special tokens."""
    torch.manual_seed(0)
    config = BertConfig(**SIZES, max_position_embeddings=positions)
    head = WordHead(16, (0, 2), width=8)
    torch.nn.init.constant_(head.out.bias, 3.0)  # costs are positive, as real ones
    return WordScorer(BertModel(config).eval(), tokenizer(), head)


class HashingEmbedder:
    """Bag of words: enough to tell which sentence shares words with a question."""

    def embed(self, texts: Sequence[str], unit: bool = True) -> Tensor:
        rows = torch.zeros(len(texts), 256)
        for row, text in zip(rows, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                row[zlib.crc32(word.encode()) % 256] += 1
        return torch.nn.functional.normalize(rows, dim=-1)
