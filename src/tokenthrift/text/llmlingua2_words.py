"""Words and thresholds as LLMLingua-2's authors' code makes them of a tokenizer's pieces, with its peculiarities."""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..ops.tokens import Span


@dataclass
class Word:
    """Some pieces that are kept or dropped together.

    Attributes:
        text: the pieces joined, the first one's mark (``▁``) included.
        first, last: numbers of its pieces.
        forced: their probabilities after what is forced was set to 1.
        plain: the first piece's probability, once for every piece; it is what documents are ranked by.
    """

    text: str
    first: int
    last: int
    forced: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)

    def probability(self, by: str) -> float:
        """The mean over the pieces, or the first piece's."""
        return self.forced[0] if by == "first" else sum(self.forced) / len(self.forced)


def authors_words(
    pieces: Sequence[str],
    probabilities: Sequence[float],
    *,
    force: Collection[str] = (),
    digits: bool = False,
    wordpiece: bool = False,
    special: Collection[str] = (),
) -> list[Word]:
    """The words of some pieces.

    Args:
        pieces: as the tokenizer writes them: ``▁`` begins a word, or with ``wordpiece``, ``##`` continues one. A single
            ASCII punctuation mark begins one too where pieces are marked with ``▁``.
        force: pieces that begin a word and are always kept.
        digits: pieces with a digit are kept for sure, and so are words of no other pieces.
        special: pieces to leave out.
    """
    words: list[Word] = []
    for at, (piece, p) in enumerate(zip(pieces, probabilities, strict=True)):
        if piece in special:
            continue
        pure = piece.lstrip("#") if wordpiece else piece.lstrip("▁")
        if wordpiece:
            begins = pure in force or not piece.startswith("##")
        else:
            begins = piece.startswith("▁") or piece in string.punctuation or piece in force
        digit = digits and bool(re.search(r"\d", piece))
        if begins or not words:
            words.append(Word(piece, at, at, [1.0 if digit or pure in force else p], [p]))
        else:
            word = words[-1]
            word.text, word.last = word.text + pure, at
            word.forced.append(1.0 if digit else p)
            word.plain.append(word.plain[0])
    return words


def authors_keep(
    words: Sequence[str],
    probabilities: Sequence[float],
    rate: float,
    counts: Sequence[int],
    *,
    force: Collection[str] = (),
    drop_consecutive: bool = False,
    threshold: float | None = None,
) -> list[bool]:
    """Which words of one chunk are kept: those above a percentile of the probabilities.

    Args:
        rate: share to keep.
        counts: tokens of each word; its probability counts so many times.
        drop_consecutive: of equal forced words with nothing kept between them, one is enough.
        threshold: a fixed one in the place of the percentile.
    """
    p = list(probabilities)
    drop = 100 * (1 - rate)
    if drop_consecutive:
        first, between, previous = np.percentile(p, int(drop)), False, None
        for i, word in enumerate(words):
            if word not in force:
                between |= bool(p[i] > first)
                continue
            if not between and word == previous:
                p[i] = 0.0
            between, previous = False, word
    if threshold is None:
        threshold = float(np.percentile(np.repeat(p, counts), min(int(drop + 1), 100)))
    kept: list[bool] = []
    newest = None
    for word, value in zip(words, p, strict=True):
        keep = value > threshold or value == threshold == 1
        keep = keep and not (drop_consecutive and word in force and word == newest)
        newest = word if keep else newest
        kept.append(keep)
    return kept


def authors_chunks(pieces: Sequence[str], room: int, ends: Collection[str]) -> list[Span]:
    """Where the authors' code cuts: behind the last piece that may end a chunk; a chunk may have a piece too many."""
    found: list[Span] = []
    start = 0
    while start < len(pieces):
        last = len(pieces) - 1
        if start + room <= last:
            last = next((at for at in range(start + room, start, -1) if pieces[at] in ends), start + room)
        found.append((start, last + 1))
        start = last + 1
    return found
