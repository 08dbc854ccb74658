"""FrugalPrompt: keep the words to which an encoder's answer can be attributed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..models.attributing import decompx_of, embedding_parts, globenc_of, head_of, label_parts
from ..models.pairs import as_pair, open_pair
from ..ops.tokens import Span
from .passages import pieces, span_of
from .selection import best_within, keeps_all
from .spans import join, spans_to_map, words

PARTS = 2**10
"""Pairs of tokens in a batch of sentences: both attributions hold vectors for each, which a CPU wants in its cache."""


@method(
    "frugal_prompt",
    stage="text",
    paper="FrugalPrompt: Reducing Contextual Overhead in Large Language Models via Token Attribution",
    arxiv="2510.16439",
    needs=("text", "tokenizer"),
    status="partial",
)
class FrugalPrompt:
    """Keeps the words with the highest token attribution in an encoder that reads each sentence alone.

    ``decompx`` takes what a token contributes to a label of a classifier, ``globenc`` how much of it is in the first
    token's output. Scores are brought to [0, 1] in every sentence, and those of a word's pieces are added up, so long
    words win. Both attributions equal their authors' code. Assumed: sentences and words are split by rules
    (``text.spans``) and white space stays; sentences longer than ``window`` are cut between words; of an encoder that
    is no classifier, such as the MiniLM pack, ``decompx`` takes the contribution to the length of the sentence's
    embedding; the paper's weights of sentences (LexRank) are left out.

    Attributes:
        rate: share of the tokens to keep, in (0, 1]; an int is a number of tokens.
        attribution: ``decompx`` or ``globenc``.
        label: of the classifier; the authors take the first, whatever it predicts.
        model: a pack, folder or hub id of a BERT-type encoder or classifier, or (model, tokenizer); None = the
            embedder's that is there, MiniLM by default.
        compat: ``budget`` keeps the best words that fit into the rate of the user's tokens; ``percent`` is the paper's
            rule, a share ``rate`` of the words, however many tokens that may be.
        window: tokens of a sentence that are read together, at most; memory grows with its square.

    Raises:
        ThriftError: parameters outside these ranges; when a text comes: a model that is no BERT-type encoder, or has
            no such label.
    """

    rate: float = 0.5
    attribution: str = "decompx"
    label: int = 0
    model: Any = None
    compat: str = "budget"
    window: int = 128

    def __post_init__(self) -> None:
        budget = Budget.of(self.rate)
        if self.attribution not in ("decompx", "globenc") or self.compat not in ("budget", "percent"):
            raise ThriftError("frugal_prompt knows attribution='decompx', 'globenc' and compat='budget', 'percent'")
        if self.compat == "percent" and budget.ratio is None:
            raise ThriftError("frugal_prompt(compat='percent') needs a rate such as 0.5, not a number of tokens")
        if self.label < 0 or self.window < 4:
            raise ThriftError("frugal_prompt needs a label of at least 0 and a window of at least 4 tokens")
        object.__setattr__(self, "model", as_pair("frugal_prompt", self.model))

    def prepare(self, view: View) -> tuple[Any, Any]:
        """The encoder and its tokenizer."""
        return (view.embedder.model, view.embedder.tokenizer) if self.model is None else open_pair(self.model)

    def reduce(self, view: View) -> TokenMap:
        text = view.text
        units = words(text)
        if keeps_all(text, units, self.rate, view.tokenizer):
            return spans_to_map(units, len(text))
        scores = self.salience(text, units, *self.prepare(view))
        if self.compat == "percent":
            count = max(round(len(units) * float(self.rate)), 1)
            best = sorted(range(len(units)), key=lambda i: (-scores[i], i))[:count]
            kept = [units[i] for i in sorted(best)]
        else:
            kept = best_within(text, units, scores, self.rate, view.tokenizer)
        return spans_to_map(kept, len(text))

    def salience(self, text: str, units: Sequence[Span], model: Any, tokenizer: Any) -> list[float]:
        """Of every word: the sum over its tokens, each between 0 and 1 in its sentence."""
        ends = [end for _, end in units]
        total = [0.0] * len(units)
        # Two places of a window are for the special tokens.
        alone = [span_of(units, part) for part in pieces(text, units, tokenizer, self.window - 2)]
        for spans, inputs, offsets in _batches(text, alone, model, tokenizer):
            scores = self.of_tokens(model, inputs).cpu()
            masks = inputs["attention_mask"].bool().cpu()
            for (start, _), row, mask, places in zip(spans, scores, masks, offsets, strict=True):
                by_word: dict[int, float] = {}
                for value, (a, b) in zip(unit_range(row[mask]).tolist(), places[mask].tolist(), strict=True):
                    # Special tokens cover no characters; they are a part of the sentence's range all the same.
                    word = bisect_right(ends, start + a) if b > a else -1 - len(by_word)
                    by_word[word] = by_word.get(word, 0.0) + value
                if self.attribution == "globenc":
                    again = unit_range(torch.tensor(list(by_word.values()))).tolist()
                    by_word = dict(zip(by_word, again, strict=True))
                for word, value in by_word.items():
                    if word >= 0:
                        total[word] += value
        return total

    def of_tokens(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """``(batch, tokens)``."""
        if self.attribution == "globenc":
            return globenc_of(model, inputs)[:, 0]
        parts = decompx_of(model, inputs)
        if head_of(model) is None:
            return embedding_parts(parts, inputs["attention_mask"])
        by_label = label_parts(model, parts)
        if self.label >= by_label.shape[-1]:
            raise ThriftError(f"frugal_prompt(label={self.label}): {type(model).__name__} has {by_label.shape[-1]}")
        return by_label[..., self.label]


def unit_range(scores: Tensor) -> Tensor:
    """Scores brought to [0, 1]; all 0 where they are equal."""
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else torch.zeros_like(scores)


def _batches(
    text: str, alone: Sequence[Span], model: Any, tokenizer: Any
) -> Iterator[tuple[list[Span], dict[str, Tensor], Tensor]]:
    """Sentences of similar length together: where they are, what the model reads, and the characters of its tokens."""
    by_length = sorted(alone, key=lambda span: span[0] - span[1])
    at = 0
    while at < len(by_length):
        longest = len(tokenizer(join(text, by_length[at : at + 1]), verbose=False)["input_ids"])
        spans = by_length[at : at + max(PARTS // longest**2, 1)]
        batch = tokenizer(
            [join(text, [span]) for span in spans],
            padding=True,
            truncation=True,
            max_length=min(512, model.config.max_position_embeddings),
            return_offsets_mapping=True,
            return_tensors="pt",
        ).to(model.device)
        yield spans, {k: batch[k] for k in ("input_ids", "attention_mask")}, batch["offset_mapping"].cpu()
        at += len(spans)
