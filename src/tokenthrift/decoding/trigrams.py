"""ADED's table of what follows two tokens: shares in a corpus, and what was seen since."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..core.errors import ThriftError

Row = dict[int, float]
STEP, MOST, WINDOW = 0.04, 3.0, 16
"""What one look at a trigram adds, up to what, and how many of the last tokens are looked at in a step."""
WIDTH = 12
"""Successors kept of two tokens."""
MANY = 100_000
"""Pairs of tokens that are kept beside those of the corpus."""


class Trigrams:
    """The successors of every two tokens: shares in the corpus, plus what was seen since.

    Args:
        corpus: shares of the successors; never changed, so several tables may have the same.
    """

    def __init__(self, corpus: Mapping[tuple[int, int], Row] | None = None) -> None:
        self.corpus = corpus or {}
        self.seen: dict[tuple[int, int], Row] = {}

    def __getitem__(self, pair: tuple[int, int]) -> Row:
        return self.seen.get(pair) or self.corpus.get(pair) or {}

    def look(self, tokens: Sequence[int]) -> None:
        """Add to every trigram of a text."""
        for pair, token in zip(pairwise(tokens), tokens[2:], strict=False):
            row = self.seen.pop(pair, None)
            if row is None:
                row = dict(self.corpus.get(pair, ()))
            self.seen[pair] = row  # the pairs looked at last are last
            row[token] = min(row.get(token, 0.0) + STEP, MOST)
            if len(row) > WIDTH:
                del row[min(row, key=row.__getitem__)]
        while len(self.seen) > MANY:
            del self.seen[next(iter(self.seen))]


def shares(texts: Iterable[Sequence[int]]) -> dict[tuple[int, int], Row]:
    """Of every two tokens that follow each other in the texts, the 12 most frequent successors and their shares."""
    counts: dict[tuple[int, int], Counter[int]] = {}
    for text in texts:
        for pair, token in zip(pairwise(text), text[2:], strict=False):
            counts.setdefault(pair, Counter())[token] += 1
    return {pair: {token: n / count.total() for token, n in count.most_common(WIDTH)} for pair, count in counts.items()}


@lru_cache(maxsize=4)
def corpus_of(path: str, changed: float, model: str) -> dict[tuple[int, int], Row]:
    """The shares of a file of JSON lines, each a list of token ids or a text.

    ``changed`` is when the file did, for the cache; ``model`` is where its tokenizer is, should there be texts.
    """
    texts: list[list[int]] = []
    tokenizer: Any = None
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = json.loads(line) if line.strip() else []
            except ValueError:
                text = None
            if isinstance(text, str):
                tokenizer = tokenizer or _tokenizer(path, model)
                text = tokenizer(text, add_special_tokens=False).input_ids
            if not isinstance(text, list) or not all(type(i) is int for i in text):
                raise ThriftError(
                    f"line {number} of the corpus {path} is neither a list of token ids nor a text: "
                    "write json.dumps(text) for each text"
                )
            texts.append(text)
    return shares(texts)


def _tokenizer(path: str, model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ThriftError(
            f"the corpus {path} has texts, and the model's tokenizer is not found at '{model}': "
            "write json.dumps(tokenizer(text).input_ids) for each text instead"
        ) from error
