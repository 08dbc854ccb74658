"""Word head: an encoder with a small head that learned from a language model which words it would miss."""

from __future__ import annotations

from os import PathLike, fspath
from typing import Any

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..models.word_head import WordScorer, load_word_scorer
from .selection import best_within, keeps_all
from .spans import spans_to_map, words


@method("word_head", stage="text", paper="Tokenthrift's own", needs=("text", "tokenizer"), status="partial")
class WordHeadMethod:
    """Keeps the words that a language model would miss most, as a small head on MiniLM has learned to tell.

    The head was trained, with the encoder frozen, on what SmolLM2-135M says of real text (``training/word_head``): how
    hard each word is to guess from what stands before it, and how much worse what follows is guessed once the word has
    been taken out. A word's worth is the weighted sum of both, in nats a token, so that what costs many tokens must be
    worth as much. No language model is run. It is the library's own, so there is no paper and no authors' code.

    Attributes:
        rate: share of the tokens to keep, in (0, 1]; an int is a number of tokens.
        model: the folder of a head that was trained by ``training/word_head``, or a ``WordScorer``; None = the head
            that comes with the library, on the minilm-l6 pack.

    Raises:
        ThriftError: parameters outside these ranges; when a text comes: a folder without a head.
    """

    rate: float = 0.5
    model: Any = None

    def __post_init__(self) -> None:
        Budget.of(self.rate)
        if isinstance(self.model, PathLike):
            object.__setattr__(self, "model", fspath(self.model))
        if not (
            self.model is None or isinstance(self.model, WordScorer) or (isinstance(self.model, str) and self.model)
        ):
            raise ThriftError(f"word_head takes model as the folder of a trained head, not {self.model!r}")

    def prepare(self, view: View) -> WordScorer:
        """The encoder with its head."""
        return self.model if isinstance(self.model, WordScorer) else load_word_scorer(self.model)

    def reduce(self, view: View) -> TokenMap:
        text, units = view.text, words(view.text)
        if keeps_all(text, units, self.rate, view.tokenizer):
            return spans_to_map(units, len(text))
        scores = self.prepare(view).worth(text, units)
        return spans_to_map(best_within(text, units, scores, self.rate, view.tokenizer), len(text))
