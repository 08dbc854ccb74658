"""RECOMP, extractive: keep the sentences that a bi-encoder finds nearest to the question."""

from __future__ import annotations

from typing import Any

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..models.pairs import as_pair, open_pair
from ..models.scoring import Embedder
from .asking import best_of_first, question_of
from .selection import keeps_all
from .spans import join, sentences, spans_to_map


@method(
    "recomp_extractive",
    stage="text",
    paper="RECOMP: Improving Retrieval-Augmented LMs with Compression and Selective Augmentation",
    arxiv="2310.04408",
    needs=("text", "question", "tokenizer"),
    status="partial",
)
class RecompExtractive:
    """Keeps the sentences whose embedding has the largest dot product with the question's, in their original order.

    One encoder embeds both: the mean of the last hidden states over the real tokens, not brought to unit length. The
    scores are those of the authors' code. Assumed: sentences are split by rules (``text.spans.sentences``), stay in
    the order of the text, and are kept up to a rate too. The authors' trained encoders are
    ``fangyuan/{nq,tqa,hotpotqa}_extractive_compressor``.

    Attributes:
        rate: share of the tokens to keep, in (0, 1]; an int is a number of tokens.
        top: sentences to keep at most; None = as many as the rate allows. ``rate=1.0, top=2`` is the authors' rule.
        model: a pack, folder or hub id, or (model, tokenizer); None = the embedder that is there, MiniLM by default.

    Raises:
        ThriftError: parameters outside these ranges; when a text comes: no question, or a model that cannot be loaded.
    """

    rate: float = 0.5
    top: int | None = None
    model: Any = None

    def __post_init__(self) -> None:
        Budget.of(self.rate)
        if self.top is not None and self.top < 1:
            raise ThriftError(f"recomp_extractive(top={self.top}) keeps nothing: give at least 1, or None for no limit")
        object.__setattr__(self, "model", as_pair("recomp_extractive", self.model))

    @property
    def limited(self) -> bool:
        """Whether something beside the rate may drop sentences."""
        return self.top is not None

    def prepare(self, view: View) -> Embedder:
        """The encoder."""
        question_of(view, "recomp_extractive")
        if self.model is None:
            embedder: Embedder = view.embedder
            return embedder
        model, tokenizer = open_pair(self.model)
        return Embedder(model, tokenizer, max_length=min(512, model.config.max_position_embeddings))

    def reduce(self, view: View) -> TokenMap:
        text, question = view.text, question_of(view, "recomp_extractive")
        units = sentences(text)
        if keeps_all(text, units, self.rate, view.tokenizer) and self.top is None:
            return spans_to_map(units, len(text))
        embedded = self.prepare(view).embed([question, *(join(text, [unit]).strip() for unit in units)], unit=False)
        scores = (embedded[1:] @ embedded[0]).tolist()
        return spans_to_map(best_of_first(text, units, scores, self.rate, view.tokenizer, self.top), len(text))
