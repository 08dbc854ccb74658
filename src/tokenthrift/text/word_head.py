"""Word head: an encoder with a small head that learned from a language model which words it would miss."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from os import PathLike, fspath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.budget import Budget
from ..core.errors import ThriftError, check_choice
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..models.word_head import WordScorer, load_word_scorer
from ..ops.tokens import Span, count_tokens
from .selection import best_within, collecting, keeps_all
from .spans import join, phrases, spans_to_map, words

LEVELS = {"word": words, "phrase": phrases}
Array = NDArray[np.float64]


@method("word_head", stage="text", paper="Tokenthrift's own", needs=("text", "tokenizer"), status="partial")
class WordHeadMethod:
    """Keeps what a language model would miss most, as a small head on MiniLM has learned to tell of every word.

    The head was trained, with the encoder frozen, on what SmolLM2-135M says of real text (``training/word_head``): how
    hard each word is to guess from what stands before it, and how much worse what follows is guessed once the word has
    been taken out. A word's worth is the weighted sum of both, in nats a token, so that what costs many tokens must be
    worth as much. Worth is then spread over the words around, so that runs of words stay rather than single ones, and
    with them answers of several words. No language model is run. It is the library's own: there is no paper and no
    authors' code.

    Attributes:
        rate: share of the tokens to keep, in (0, 1]; an int is a number of tokens.
        level: what is dropped as a whole: a ``word``, or a ``phrase``, whose worth is the mean over its tokens.
        smooth: standard deviation of the Gaussian by which worth is spread, in phrases (or words); 0 = not at all.
        tail: share of the budget for the last words, which a model goes on from; not where a text is read in chunks.
        model: the folder of a head that was trained by ``training/word_head``, or a ``WordScorer``; None = the head
            that comes with the library, on the minilm-l6 pack.

    Raises:
        ThriftError: parameters outside these ranges; when a text comes: a folder without a head.
    """

    rate: float = 0.5
    level: str = "phrase"
    smooth: float = 2.0
    tail: float = 0.1
    model: Any = None

    def __post_init__(self) -> None:
        Budget.of(self.rate)
        check_choice("word_head", "level", self.level, LEVELS)
        if not (0 <= self.smooth < math.inf):
            raise ThriftError(
                f"word_head smooth {self.smooth} is no number of words: 2 is the default, 0 spreads nothing"
            )
        if not 0 <= self.tail <= 1:
            raise ThriftError(f"word_head tail {self.tail} is outside [0, 1]: 0.1 is a tenth of the budget, 0 nothing")
        if isinstance(self.model, PathLike):
            object.__setattr__(self, "model", fspath(self.model))
        if not (self.model is None or isinstance(self.model, WordScorer | str)) or self.model == "":
            raise ThriftError(f"word_head takes model as the folder of a trained head, not {self.model!r}")

    def prepare(self, view: View) -> WordScorer:
        """The encoder with its head."""
        return self.model if isinstance(self.model, WordScorer) else load_word_scorer(self.model)

    def reduce(self, view: View) -> TokenMap:
        text, units = view.text, LEVELS[self.level](view.text)
        if keeps_all(text, units, self.rate, view.tokenizer):
            return spans_to_map(units, len(text))
        scores = self.of_units(text, units, self.prepare(view))
        for unit in range(len(units) - self.last(text, units, view.tokenizer), len(units)):
            scores[unit] = float("inf")
        return spans_to_map(best_within(text, units, scores, self.rate, view.tokenizer), len(text))

    def of_units(self, text: str, units: Sequence[Span], judge: WordScorer) -> list[float]:
        """The worth of each unit: the mean over the tokens of its words, and of those around it."""
        each = words(text)
        ends = [end for _, end in units]
        nats, tokens = np.zeros(len(units)), np.zeros(len(units))
        for (_, end), (worth, count) in zip(each, judge.worth(text, each), strict=True):
            unit = bisect_right(ends, end - 1)
            nats[unit] += worth * count
            tokens[unit] += count
        mean = spread(nats, self.smooth) / np.maximum(spread(tokens, self.smooth), 1e-9)
        return [float(m) if t else math.inf for m, t in zip(mean, tokens, strict=True)]  # inf: it costs next to nothing

    def last(self, text: str, units: Sequence[Span], tokenizer: Any) -> int:
        """How many units at the end have the share of the budget that is theirs."""
        if not self.tail or collecting():
            return 0
        room = int(self.tail * Budget.of(self.rate).tokens(count_tokens(tokenizer, text)))
        count = 0
        while count < min(len(units), LONGEST):
            room -= count_tokens(tokenizer, join(text, [units[-1 - count]]))
            if room < 0:
                break
            count += 1
        return count


def spread(values: Array, deviation: float) -> Array:
    """Each value shared out to its neighbours by a Gaussian, ``(n,)`` to ``(n,)``; what leaves at the ends is lost."""
    if not deviation or not len(values):
        return values
    reach = min(math.ceil(4 * deviation), len(values))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    return np.convolve(values, kernel / kernel.sum())[reach : reach + len(values)]


LONGEST = 24
"""Units at the end that are kept for being there, at most."""
