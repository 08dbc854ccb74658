"""TCRA-LLM, semantic compression: drop the words that change the meaning of a passage least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.tokens import Span, count_tokens
from .passages import passages, pieces, span_of
from .selection import best_within, keeps_all
from .spans import join, spans_to_map, words


@method(
    "tcra",
    stage="text",
    paper="TCRA-LLM: Token Compression Retrieval Augmented Large Language Model for Inference Cost Reduction",
    arxiv="2310.15556",
    needs=("text", "tokenizer", "embedder"),
    status="partial",
)
class TCRA:
    """Keeps the words without which the embedding of their passage would move most.

    A word's score is the cosine distance between the embedding of its passage and that of the passage without the
    word, so every word costs an embedding. There is no code of the paper's; assumed: passages are whole sentences of up
    to ``window`` tokens, as embedders read short texts; distances are taken relative to the mean of their passage, in
    which a single word weighs less the longer it is; and the words are dropped in ``rounds`` of equal size, each scored
    on what the one before left. The paper's other part, summaries, writes new text, which no selection can:
    :func:`tokenthrift.text.summarise.summarise`.

    Attributes:
        rate: share of the tokens to keep, in (0, 1]; an int is a number of tokens.
        rounds: with 1 all words are scored on the whole text, and a smaller rate keeps some of the words of a larger.
        window: tokens of a passage, at most.

    Raises:
        ThriftError: parameters outside these ranges.
    """

    rate: float = 0.5
    rounds: int = 1
    window: int = 64

    def __post_init__(self) -> None:
        Budget.of(self.rate)
        if self.rounds < 1 or self.window < 1:
            raise ThriftError("tcra needs rounds and window of at least 1")

    def reduce(self, view: View) -> TokenMap:
        text, units = view.text, words(view.text)
        if keeps_all(text, units, self.rate, view.tokenizer):
            return spans_to_map(units, len(text))
        total = count_tokens(view.tokenizer, text)
        target = Budget.of(self.rate).tokens(total)
        parts = self.passages(text, units, view.tokenizer)
        scores, kept = [0.0] * len(units), units
        for done in range(1, self.rounds + 1):
            alive = torch.zeros(len(text), dtype=torch.bool)
            for start, end in kept:
                alive[start:end] = True
            for part in parts:
                left = [i for i in part if bool(alive[slice(*units[i])].all())]
                for i, distance in zip(left, distances(text, [units[i] for i in left], view.embedder), strict=True):
                    # Whatever an earlier round dropped stays behind all that this one scores.
                    scores[i] = done + distance / (1 + distance)
            budget = total - (total - target) * done // self.rounds
            kept = best_within(text, units, scores, budget, view.tokenizer)
        return spans_to_map(kept, len(text))

    def passages(self, text: str, units: Sequence[Span], tokenizer: Any) -> list[range]:
        """The units of each passage."""
        alone = pieces(text, units, tokenizer, self.window)
        together = passages(text, [span_of(units, part) for part in alone], tokenizer, self.window)
        return [range(alone[part.start].start, alone[part.stop - 1].stop) for part in together]


def distances(text: str, units: Sequence[Span], embedder: Any) -> list[float]:
    """How far the embedding of these units moves without each of them: cosine distances relative to their mean."""
    if not units:
        return []
    without = [join(text, [*units[:i], *units[i + 1 :]]).strip() for i in range(len(units))]
    embedded = embedder.embed([join(text, units).strip(), *without])
    moved = (1 - embedded[1:] @ embedded[0]).clamp(min=0)
    relative: list[float] = (moved / moved.mean().clamp(min=torch.finfo(moved.dtype).tiny)).tolist()
    return relative
