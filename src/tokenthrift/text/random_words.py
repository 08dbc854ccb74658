"""Random words: the baseline that every compressor of words has to beat."""

from __future__ import annotations

from random import Random

from ..core.budget import Budget
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from .selection import best_within
from .spans import spans_to_map, words


@method("random_words", stage="text", paper="baseline: random word dropping", needs=("text", "tokenizer"))
class RandomWords:
    """Keeps words at random, each with the same chance.

    The same text, rate and seed keep the same words, on every machine; a smaller rate keeps some of those of a larger.

    Attributes:
        rate: share of the tokens to keep, in (0, 1]; an int is a number of tokens.
        seed: of the draw.
    """

    rate: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        Budget.of(self.rate)

    def reduce(self, view: View) -> TokenMap:
        units = words(view.text)
        draw = Random(self.seed)
        scores = [draw.random() for _ in units]
        return spans_to_map(best_within(view.text, units, scores, self.rate, view.tokenizer), len(view.text))
