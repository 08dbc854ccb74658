"""SpecPC on text: a small model reads the prompt, and its attention says which words another model should get."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..models.decoder import context_length, find_attentions
from ..models.draft_attention import draft_attention
from ..models.pairs import as_pair, open_pair
from ..models.scoring import document_start
from ..ops.draft_scores import score_of_layer, score_of_steps, smoothed
from ..ops.tokens import Span, encode
from .selection import best_within, keeps_all
from .spans import spans_to_map, words

_STAYS = 1e9
"""Above every score: of the text's last tokens, where these are the queries, and the newest highest."""


@method(
    "specpc_text",
    stage="text",
    paper="Draft-based Approximate Inference for LLMs",
    arxiv="2506.08373",
    needs=("text", "question", "tokenizer"),
    status="partial",
)
class SpecPCText:
    """Keeps the words that the end of the prompt attends to most, in a draft model.

    The scores are those of ``prefill=specpc``, which equal the authors' code: attention of the last queries, reduced
    over heads, queries and layers, and smoothed. Here they choose whole words of the text, so that the model that gets
    the prompt may be any other, with another tokenizer, behind an API. Where there is a question, it is read behind the
    text and its tokens are the queries; else these are the last tokens of the text, which then stay. Assumed: a word
    has the score of its best token; a text longer than ``context`` is read in equal parts, the question behind each;
    the draft model reads a token that starts documents first; it predicts no tokens; windows and smoothing are narrower
    by default.

    Attributes:
        rate: share of the tokens to keep, in (0, 1]; an int is a number of tokens.
        model: the draft model: a pack, folder or hub id of a causal LM, or (model, tokenizer); None = the scorer that
            is there, the smollm2-135m pack by default.
        window: the last queries that vote, at most.
        kernel: width of the smoothing.
        pool: ``max``, ``mean`` or ``none``.
        reduction: ``max`` or ``mean``.
        first_layer: of the draft model that counts.
        weighted: the queries count from 0 for the first to 1 for the last.
        context: tokens of the text that are read together, at most.

    Raises:
        ThriftError: parameters outside these ranges; when a text comes: a model that has no attention layers, too few
            of them, or a context that the question fills.
    """

    rate: float = 0.5
    model: Any = None
    window: int = 32
    kernel: int = 9
    pool: str = "max"
    reduction: str = "max"
    first_layer: int = 0
    weighted: bool = True
    context: int = 2048

    def __post_init__(self) -> None:
        Budget.of(self.rate)
        if self.pool not in ("max", "mean", "none") or self.reduction not in ("max", "mean"):
            raise ThriftError("specpc_text knows pool='max', 'mean' and 'none', and reduction='max' and 'mean'")
        if min(self.window, self.kernel, self.context) < 1 or self.first_layer < 0:
            raise ThriftError("specpc_text needs window, kernel and context of at least 1, first_layer of at least 0")
        object.__setattr__(self, "model", as_pair("specpc_text", self.model))

    def prepare(self, view: View) -> tuple[Any, Any]:
        """The draft model and its tokenizer."""
        return (view.scorer.model, view.scorer.tokenizer) if self.model is None else open_pair(self.model)

    def reduce(self, view: View) -> TokenMap:
        text, units = view.text, words(view.text)
        if keeps_all(text, units, self.rate, view.tokenizer):
            return spans_to_map(units, len(text))
        scores = self.attended(text, units, view.question, *self.prepare(view))
        return spans_to_map(best_within(text, units, scores, self.rate, view.tokenizer), len(text))

    def attended(
        self, text: str, units: Sequence[Span], question: str | None, model: Any, tokenizer: Any
    ) -> list[float]:
        """Of every word, the score of its best token."""
        if not find_attentions(model):
            raise ThriftError(f"{type(model).__name__} cannot draft for specpc_text: choose a causal language model")
        ids, spans = encode(tokenizer, [text])[0]
        asked = encode(tokenizer, [f"\n\n{question}"])[0][0] if question else []
        start = document_start(tokenizer)
        first = [] if start is None else [start]
        room = min(self.context, (context_length(model) or 1 << 30) - len(asked) - len(first))
        if room < 1:
            raise ThriftError(
                f"the question has {len(asked):,} tokens, the draft model's context is {context_length(model):,}: "
                "shorten the question or choose another model"
            )
        parts = max(-(-len(ids) // room), 1)
        edges = [len(ids) * i // parts for i in range(parts + 1)]
        reduce = partial(score_of_layer, reduction=self.reduction, weighted=self.weighted)

        best = [0.0] * len(units)
        ends = [end for _, end in units]
        for a, b in pairwise(edges):
            prompt = torch.tensor([[*first, *ids[a:b], *asked]])
            rows = min(self.window, len(asked) or b - a)
            found = draft_attention(model, prompt, torch.ones_like(prompt).bool(), rows, 1, self.first_layer, reduce)
            scores = score_of_steps(found, self.reduction)[:, len(first) : len(first) + b - a]
            values = smoothed(scores.cpu().float(), self.kernel, self.pool)[0].tolist()
            if not asked and b == len(ids):
                values[-rows:] = [_STAYS + i for i in range(rows)]
            for value, (s, e) in zip(values, spans[a:b], strict=True):
                # White space before a word belongs to it, so a token may only touch the word before.
                word = bisect_right(ends, max(e - 1, s))
                if word < len(best):
                    best[word] = max(best[word], value)
        return best
