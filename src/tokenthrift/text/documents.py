"""Prompts made of several documents: which of them to keep, in what order, and how much of each.

The coarse stage of LLMLingua (arXiv 2310.05736, "budget controller") and LongLLMLingua (arXiv 2310.06839). Documents
lie in one text, with a separator between them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..ops.tokens import Span
from .spans import words

ORDERS = ("original", "relevance", "two_stage")


def split_documents(text: str, separator: str) -> list[Span]:
    """The documents, without the white space around them; the whole text where nothing separates.

    Args:
        separator: what stands between documents, e.g. an empty line; an empty string for one document.
    """
    found: list[Span] = []
    start = 0
    for piece in text.split(separator) if separator else [text]:
        body = piece.strip()
        if body:
            at = start + piece.index(body)
            found.append((at, at + len(body)))
        start += len(piece) + len(separator)
    if len(found) < 2:
        return [(0, len(text))]
    # What is before the first and behind the last belongs to them, so that only gaps between documents are left.
    return [(0, found[0][1]), *found[1:-1], (found[-1][0], len(text))]


@dataclass(frozen=True)
class Units:
    """Words that tile a text of documents, the gap between two documents a unit of its own.

    Attributes:
        spans: where the units are.
        document: the document of each; a gap belongs to the document behind it.
        gap: true for the gaps.
    """

    spans: list[Span]
    document: list[int]
    gap: list[bool]

    @classmethod
    def of(cls, text: str, documents: Sequence[Span]) -> Units:
        """The words of all documents and the gaps."""
        spans: list[Span] = []
        document: list[int] = []
        gap: list[bool] = []
        for i, (start, end) in enumerate(documents):
            inside = [(start + a, start + b) for a, b in words(text[start:end])]
            before = [(documents[i - 1][1], start)] if i else []
            spans += before + inside
            document += [i] * (len(before) + len(inside))
            gap += [True] * len(before) + [False] * len(inside)
        return cls(spans, document, gap)

    @classmethod
    def tokens(cls, spans: list[Span], documents: Sequence[Span]) -> Units:
        """Tokens as units: white space behind a document counts as part of it, and there are no gaps."""
        starts = [start for start, _ in documents]
        return cls(spans, [max(bisect_right(starts, end - 1) - 1, 0) for _, end in spans], [False] * len(spans))

    def of_tokens(self, tokens: Sequence[Span]) -> list[int]:
        """The unit in which each token ends."""
        ends = [end for _, end in self.spans]
        return [min(bisect_right(ends, end - 1), len(ends) - 1) for _, end in tokens]


def within_budget(lengths: Sequence[int], ranking: Sequence[int], target: float, extra: float = 100) -> list[int]:
    """The documents of the ranking until they have ``target + extra`` tokens; the one that crosses is included.

    Args:
        lengths: tokens of each document.
        ranking: their numbers, best first.
        target: tokens to keep in the end; below 0 it counts as 100, as in the authors' code.
        extra: how many tokens more the fine stage is given to choose from.
    """
    left = (target if target >= 0 else 100) + extra
    used: list[int] = []
    for i in ranking:
        used.append(i)
        left -= lengths[i]
        if left < 0:
            break
    return used


def arranged(used: Sequence[int], order: str) -> list[int]:
    """Documents, given best first, in the order of the text, by relevance, or the best at both ends (two_stage)."""
    if order == "original":
        return sorted(used)
    return [*used[::2], *used[1::2][::-1]] if order == "two_stage" else list(used)


def rate_changes(used: Sequence[int], spread: float) -> dict[int, float]:
    """What is added to the rate of each document, given best first: from ``+spread`` down to ``-spread``, evenly."""
    if spread <= 0 or len(used) < 2:
        return dict.fromkeys(used, 0.0)
    step = spread / (len(used) - 1)
    return {i: (len(used) - 1 - 2 * k) * step for k, i in enumerate(used)}


def reordered(kept: Sequence[Span], documents: Sequence[Span], order: Sequence[int]) -> list[Span]:
    """What is kept, with the documents in another order: no character is written or used twice.

    A document brings the gap before it along. The one that is first now gives its gap to the text's first document,
    which has none.

    Args:
        kept: spans in the order of the text; none holds parts of a document and of a gap.
        documents: spans of all documents.
        order: numbers of the documents in their new order; those that are not named go.
    """
    starts = [start for start, _ in documents]
    bodies: dict[int, list[Span]] = {}
    gaps: dict[int, list[Span]] = {}
    for span in kept:
        i = max(bisect_right(starts, span[0]) - 1, 0)
        if span[0] < documents[i][1]:
            bodies.setdefault(i, []).append(span)
        else:
            gaps.setdefault(i + 1, []).append(span)
    order = [i for i in order if i in bodies]
    if not order:
        return []
    return bodies[order[0]] + [span for i in order[1:] for span in (gaps.get(i or order[0], []) + bodies[i])]


def gaps_between(documents: Sequence[Span]) -> list[Span]:
    """What lies between the documents."""
    return [(a[1], b[0]) for a, b in pairwise(documents)]
