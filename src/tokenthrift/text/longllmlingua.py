"""LongLLMLingua: documents and tokens by what they have to do with the question."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core.errors import ThriftError
from ..core.method import method
from ..core.view import View
from ..ops.tokens import Span, encode
from .documents import split_documents
from .llmlingua import as_the_authors, by_perplexity, check, coarse_to_fine

if TYPE_CHECKING:
    from ..core.tokenmap import TokenMap

ANSWERABLE = " We can get the answer to this question in the given documents."
"""What follows the question where documents are ranked, as in the paper."""


@method(
    "longllmlingua",
    stage="text",
    paper="LongLLMLingua: Accelerating and Enhancing LLMs in Long Context Scenarios via Prompt Compression",
    arxiv="2310.06839",
    needs=("text", "question", "tokenizer", "scorer"),
)
class LongLLMLingua:
    """Keeps the tokens that the question makes easier to guess, and more of the documents that explain the question.

    Documents are ranked by how well the question can be guessed behind each, and taken until the budget and ``spare``
    tokens are filled; better ones keep a larger share. A token's score is its surprise without the question less
    that with it, else all is as in ``llmlingua``. Without a question, it is ``llmlingua``. ``recover`` in
    ``text/recovery.py`` mends names that an answer quotes in their shortened form. ``compat="llmlingua"`` makes the
    decisions of the authors' code, golden cases equal.

    Attributes:
        rate: share of the tokens to keep, in (0, 1]; an int is a number of tokens.
        level: what is dropped as a whole: ``word``, or ``token`` as in the paper, which may be a part of a word.
        size: tokens of a segment, counted by the scorer's tokenizer.
        separator: what stands between documents.
        spare: how many tokens more than the budget the chosen documents have.
        spread: how much is added to the rate of the best document, and taken from the worst's.
        order: of the documents in the result: ``original``; ``relevance``, the best first, the paper's remedy for
            what gets lost in the middle; or ``two_stage``, the best at both ends. The result then is a permutation of
            parts of the text; the gaps between documents stay where they are.
        compat: ``budget``, or ``llmlingua`` for the authors' choice of tokens.
    """

    rate: float = 0.5
    level: str = "word"
    size: int = 200
    separator: str = "\n\n"
    spare: int = 100
    spread: float = 0.3
    order: str = "original"
    compat: str = "budget"

    def __post_init__(self) -> None:
        check(self, "longllmlingua")
        if not 0 <= self.spread <= 1:
            raise ThriftError(f"longllmlingua spread {self.spread} is outside [0, 1]; 0.3 is the authors' value")

    def reduce(self, view: View) -> TokenMap:
        documents = split_documents(view.text, self.separator)
        exact = self.compat == "llmlingua"
        if view.question:
            ranking = by_question(view, documents, exact)
        else:
            ranking, scored = by_perplexity(view, documents, exact)
        alone = view.scorer.reading(start=not exact)
        asked = view.scorer.reading(start=not exact)
        if exact:
            both: dict[str, Any] = (
                {"question": f"{view.question}\n\n", "alone": alone.surprise} if view.question else {}
            )
            return as_the_authors(view, self, documents, ranking, asked.surprise, **both)

        if not view.question:
            return coarse_to_fine(view, self, documents, ranking, scored)
        question = _prefix(view, alone.limit)

        def contrast(ids: list[int], last: int) -> Any:
            return alone.surprise(ids, last) - asked.surprise([*question, *ids], last, fixed=len(question))

        return coarse_to_fine(view, self, documents, ranking, lambda _: contrast)


def by_question(view: View, documents: list[Span], exact: bool = False) -> list[int]:
    """The documents, the one behind which the question is easiest to guess first.

    Args:
        exact: as in the authors' code, nothing stands before a document.
    """
    scorer, asked = view.scorer, view.question + ANSWERABLE
    if len(documents) < 2:
        return [0]
    pieces = [view.text[start:end] for start, end in documents]
    encoded = encode(scorer.tokenizer, [piece + asked for piece in pieces])
    surprise = []
    for piece, (ids, spans) in zip(pieces, encoded, strict=True):
        last = sum(end > len(piece) for _, end in spans)
        surprise.append(float(scorer.reading(start=not exact).surprise(ids, last).mean()))
    return sorted(range(len(documents)), key=lambda i: surprise[i])


def _prefix(view: View, limit: int | None) -> list[int]:
    """The tokens of the question and an empty line; of one longer than half of the positions, both ends."""
    ids: list[int] = encode(view.scorer.tokenizer, [view.question + "\n\n"])[0][0]
    room = len(ids) if limit is None else limit // 2
    return ids if len(ids) <= room else ids[: room // 2] + ids[len(ids) - (room - room // 2) :]
