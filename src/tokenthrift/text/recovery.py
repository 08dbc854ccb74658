"""Names in an answer, as the original text has them (LongLLMLingua, arXiv 2310.06839, "subsequence recovery")."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from ..ops.tokens import Span, encode


def recover(original: str, compressed: str, answer: str, tokenizer: Any, *, gap: int = 10) -> str:
    """The answer, with what it quotes from the compressed text replaced by what the original says there.

    The longest runs of words that stand in the compressed text are looked up in the original: the shortest stretch
    that begins with a run's first token and has the most of its tokens in order, at most ``gap`` tokens apart.

    Args:
        original: the text before compression.
        compressed: what the model was given.
        answer: what it wrote.
        tokenizer: a fast tokenizer; any will do.
        gap: how many tokens ahead the next one may be. 10 is the authors' number.
    """
    ids, spans = encode(tokenizer, [original])[0]
    places: dict[int, list[int]] = {}
    for at, token in enumerate(ids):
        places.setdefault(token, []).append(at)

    words, out, at = answer.split(" "), [], 0
    while at < len(words):
        end = at + 1
        if words[at] and words[at] in compressed:
            while end < len(words) and " ".join(words[at : end + 1]) in compressed:
                end += 1
        run = " ".join(words[at:end])
        found = _stretch(run, places, tokenizer, gap) if words[at] and run in compressed else None
        out.append(original[spans[found[0]][0] : spans[found[1]][1]].strip() if found else run)
        at = end
    return " ".join(out)


def _stretch(run: str, places: dict[int, list[int]], tokenizer: Any, gap: int) -> Span | None:
    """First and last token of the original's best stretch for a run of words, if two tokens or more are found."""
    wanted = encode(tokenizer, [run])[0][0]
    best, most, length = None, 1, 0
    for first in places.get(wanted[0], []) if wanted else []:
        last, count = first, 1
        for token in wanted[1:]:
            known = places.get(token, [])
            next_at = bisect_right(known, last)
            if next_at < len(known) and known[next_at] - last <= gap:
                last, count = known[next_at], count + 1
        if count > most or (count == most and best is not None and last - first < length):
            best, most, length = (first, last), count, last - first
    return best
