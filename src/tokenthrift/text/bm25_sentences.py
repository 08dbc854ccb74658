"""BM25: keep the sentences that share rare words with the question. The baseline of retrieval without a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from math import log

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from .asking import question_of
from .selection import best_within, keeps_all
from .spans import join, sentences, spans_to_map

_SOLID = "\u3040-\u30ff\u3400-\u9fff"  # written without spaces: each character is a term
_TERM = re.compile(rf"[{_SOLID}]|[^\W{_SOLID}]+")


@method(
    "bm25_sentences",
    stage="text",
    paper="The Probabilistic Relevance Framework: BM25 and Beyond",
    needs=("text", "question", "tokenizer"),
)
class BM25Sentences:
    """Keeps the sentences with the highest Okapi BM25 score for the question, in their original order.

    A sentence is a document, its terms are lower-case words. Scores equal those of the ``rank_bm25`` package, which
    RECOMP and LLMLingua take as their baseline; a term that more than half of the sentences have gets ``epsilon`` of
    the mean inverse document frequency. Where scores are equal, as of all sentences without a term of the question, the
    earlier sentence is kept.

    Attributes:
        rate: share of the tokens to keep, in (0, 1]; an int is a number of tokens.
        k1: how soon more occurrences of a term in a sentence stop counting.
        b: how much long sentences are held back, from 0 to 1.
        epsilon: see above.

    Raises:
        ThriftError: parameters outside these ranges; when a text comes: no question.
    """

    rate: float = 0.5
    k1: float = 1.5
    b: float = 0.75
    epsilon: float = 0.25

    def __post_init__(self) -> None:
        Budget.of(self.rate)
        if not (self.k1 >= 0 and 0 <= self.b <= 1 and self.epsilon >= 0):
            raise ThriftError("bm25_sentences needs k1 and epsilon of at least 0, and b from 0 to 1")

    def reduce(self, view: View) -> TokenMap:
        text, question = view.text, question_of(view, "bm25_sentences")
        units = sentences(text)
        if keeps_all(text, units, self.rate, view.tokenizer):
            return spans_to_map(units, len(text))
        scores = okapi(terms(question), [terms(join(text, [unit])) for unit in units], self.k1, self.b, self.epsilon)
        return spans_to_map(best_within(text, units, scores, self.rate, view.tokenizer), len(text))


def terms(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _TERM.findall(text.lower())


def okapi(
    query: Sequence[str], documents: Sequence[Sequence[str]], k1: float = 1.5, b: float = 0.75, epsilon: float = 0.25
) -> list[float]:
    """The BM25 score of every document; a term counts as often as the query has it."""
    counts = [Counter(document) for document in documents]
    having = Counter(term for count in counts for term in count)
    idf = {term: log(len(documents) - n + 0.5) - log(n + 0.5) for term, n in having.items()}
    common = epsilon * sum(idf.values()) / max(len(idf), 1)
    idf = {term: value if value >= 0 else common for term, value in idf.items()}

    mean = sum(map(len, documents)) / max(len(documents), 1) or 1
    scores = []
    for document, count in zip(documents, counts, strict=True):
        held_back = k1 * (1 - b + b * len(document) / mean)
        scores.append(sum(idf[t] * count[t] * (k1 + 1) / (count[t] + held_back) for t in query if count[t]))
    return scores
