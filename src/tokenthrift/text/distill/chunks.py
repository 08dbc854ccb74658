"""Texts cut for the teacher: whole sentences, up to a number of tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from ...core.errors import ThriftError
from ...ops.tokens import encode
from ..spans import sentences, words


def sentence_chunks(text: str, tokenizer: Any, longest: int = 512) -> list[str]:
    """Consecutive sentences of at most ``longest`` tokens together; a longer sentence is cut between words.

    Long texts are shortened too much by a teacher, which is why the paper cuts them.
    """
    if longest < 1:
        raise ThriftError(f"chunks of {longest} tokens hold nothing: write 512, say")
    units = [unit for start, end in sentences(text) for unit in _pieces(text, start, end, tokenizer, longest)]
    lengths = [len(ids) for ids, _ in encode(tokenizer, [text[a:b] for a, b in units])]
    cuts, filled = [0], 0
    for i, length in enumerate(lengths):
        if filled and filled + length > longest:
            cuts.append(i)
            filled = 0
        filled += length
    made = [text[units[a][0] : units[b - 1][1]].strip() for a, b in pairwise([*cuts, len(units)]) if a < b]
    return [chunk for chunk in made if chunk]


def _pieces(text: str, start: int, end: int, tokenizer: Any, longest: int) -> list[tuple[int, int]]:
    """A sentence, or parts of it that are short enough."""
    if len(encode(tokenizer, [text[start:end]])[0][0]) <= longest:
        return [(start, end)]
    return [(start + a, start + b) for a, b in words(text[start:end])]
