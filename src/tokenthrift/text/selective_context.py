"""Selective Context: drop the parts of a prompt that a language model could have guessed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..core.budget import Budget
from ..core.errors import ThriftError, check_choice
from ..core.method import method
from ..core.view import View
from ..ops.tokens import Span
from .selection import best_within
from .spans import disjoint, phrases, sentences, spans_to_map

if TYPE_CHECKING:
    from ..core.tokenmap import TokenMap

LEVELS = ("token", "phrase", "sentence")
Scored = Sequence[tuple[int, int, float]]
"""Tokens: start, end, self-information."""


@method(
    "selective_context",
    stage="text",
    paper="Compressing Context to Enhance Inference Efficiency of Large Language Models",
    arxiv="2310.06201",
    needs=("text", "tokenizer", "scorer"),
    status="partial",
)
class SelectiveContext:
    """Keeps the units of a text with the highest self-information ``-ln p(token | before)`` under a causal LM.

    A unit's information is the mean over its tokens; each sentence is scored on its own, as in the paper. Assumed:
    phrases are rule-made chunks (``text.spans.phrases``) instead of spaCy's noun chunks, and white space is kept as it
    is in the text instead of collapsed. Alignment of tokens to units and the filter are those of the authors' code.

    Attributes:
        rate: share of the tokens to keep, in (0, 1]; an int is a number of tokens.
        level: what is dropped as a whole: ``token``, ``phrase`` or ``sentence``. Tokens may be parts of words.
        context: what a token is conditioned on: its ``sentence``, or the whole ``document`` before it.
        compat: ``budget`` keeps the best units that fit into the rate of the user's tokens; ``percentile`` is the
            paper's filter, which drops a share ``1 - rate`` of the units, however many tokens that may be.
    """

    rate: float = 0.5
    level: str = "phrase"
    context: str = "sentence"
    compat: str = "budget"

    def __post_init__(self) -> None:
        budget = Budget.of(self.rate)
        check_choice("selective_context", "level", self.level, LEVELS)
        if self.context not in ("sentence", "document"):
            raise ThriftError(f"selective_context has no context '{self.context}': use sentence or document")
        if self.compat not in ("budget", "percentile"):
            raise ThriftError(f"selective_context has no compat '{self.compat}': use budget or percentile")
        if self.compat == "percentile" and budget.ratio is None:
            raise ThriftError("selective_context(compat='percentile') needs a rate such as 0.5, not a number of tokens")

    def reduce(self, view: View) -> TokenMap:
        text = view.text
        tokens = view.scorer.self_information(text, sentences(text) if self.context == "sentence" else None)
        units = units_of(text, self.level, tokens)
        information = unit_information(text, tokens, units)
        if self.compat == "percentile":
            kept = [unit for unit, keep in zip(units, at_least_percentile(information, self.rate), strict=True) if keep]
        else:
            kept = best_within(text, units, information, self.rate, view.tokenizer)
        return spans_to_map(kept, len(text))


def units_of(text: str, level: str, tokens: Scored) -> list[Span]:
    """What is kept or dropped as a whole, in the order of the text."""
    if level == "token":
        return disjoint((start, end) for start, end, _ in tokens)
    if level == "sentence":
        return sentences(text)
    return phrases(text)


def unit_information(text: str, tokens: Scored, units: Sequence[Span]) -> list[float]:
    """Mean self-information of the tokens of each unit.

    A token counts for the units that end inside it, in equal shares, or else for the unit that it lies in, unless it is
    white space. A unit without tokens (characters that the scorer's tokenizer skips) is infinitely informative: it is
    kept as long as possible, as it costs next to nothing.
    """
    per_unit: list[list[float]] = [[] for _ in units]
    first = 0  # the first unit that ends after the token's start
    for start, end, nats in tokens:
        while first < len(units) and units[first][1] <= start:
            first += 1
        last = first
        while last < len(units) and units[last][1] <= end:
            last += 1
        for unit in range(first, last):
            per_unit[unit].append(nats / (last - first))
        if last == first < len(units) and not text[start:end].isspace():
            per_unit[first].append(nats)
    return [float(np.mean(nats)) if nats else float("inf") for nats in per_unit]


def at_least_percentile(information: Sequence[float], rate: float) -> list[bool]:
    """The paper's filter: true for the units that are not below the ``100 * (1 - rate)``-th percentile."""
    finite = [x for x in information if np.isfinite(x)]
    threshold = np.percentile(finite, round(100 * (1 - rate), 9)) if finite else -np.inf
    return [bool(x >= threshold) for x in information]
