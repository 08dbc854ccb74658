"""Sentence selection by embeddings: keep the sentences that are nearest to the question."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.budget import Budget
from ..core.method import method
from ..core.view import View
from .selection import best_within
from .spans import join, sentences, spans_to_map

if TYPE_CHECKING:
    from ..core.tokenmap import TokenMap


@method(
    "embedding_sentences",
    stage="text",
    paper="Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks",
    arxiv="1908.10084",
    needs=("text", "question", "tokenizer", "embedder"),
    status="partial",
)
class EmbeddingSentences:
    """Keeps the sentences with the highest cosine similarity to the question, in their original order.

    Without a question, similarity is to the mean of all sentences: what is most typical of the document is kept.
    The paper is that of the embeddings; as a prompt compressor this is the plain retrieval baseline, and no authors'
    code defines it. Assumed: sentences are split by rules (``text.spans.sentences``) and embedded at unit length.

    Attributes:
        rate: share of the tokens to keep, in (0, 1]; an int is a number of tokens.
    """

    rate: float = 0.5

    def __post_init__(self) -> None:
        Budget.of(self.rate)

    def reduce(self, view: View) -> TokenMap:
        text = view.text
        units = sentences(text)
        if len(units) < 2:
            return spans_to_map(units, len(text))

        embedded = view.embedder.embed([join(text, [unit]) for unit in units])
        target = view.embedder.embed([view.question])[0] if view.question else embedded.mean(0)
        similarity = (embedded @ target).tolist()

        kept = best_within(text, units, similarity, self.rate, view.tokenizer)
        return spans_to_map(kept, len(text))
