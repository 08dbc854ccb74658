"""The two sources of GOOSE's tree: copies from the text, and the likeliest successors of pairs of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .chances import Calibration

NGRAMS = (5, 4, 3)
MANY_PAIRS = 50_000


class Copies:
    """What followed the last 5, 4 or 3 tokens where they occurred first, and whether all occurrences agree on it.

    Args:
        longest: of one copy, in tokens.
        sure: a copy of this length is a good one.
    """

    def __init__(self, longest: int = 20, sure: int = 8) -> None:
        self.longest, self.sure = longest, sure
        self.tokens: list[int] = []
        self._seen: dict[tuple[int, ...], list[int]] = {}  # n-gram: position after it, occurrences, whether they agree

    def append(self, token: int) -> None:
        """The text grows by a token."""
        text, end = self.tokens, len(self.tokens)
        for n in NGRAMS:
            if end >= n:
                entry = self._seen.setdefault(tuple(text[-n:]), [end, 0, 1])
                entry[1] += 1
                entry[2] &= token == (text[entry[0]] if entry[0] < end else token)
        text.append(token)

    def find(self, last: Sequence[int]) -> tuple[int, int, bool]:
        """Length of the longest n-gram of these last tokens that was seen, the position after it, and whether two or
        more occurrences agree on what follows; length 0 if there is none."""
        for n in NGRAMS:
            if len(last) >= n and (entry := self._seen.get(tuple(last[-n:]))):
                return n, entry[0], entry[1] > 1 and bool(entry[2])
        return 0, 0, False

    def copy(self, last: Sequence[int]) -> tuple[list[int], float]:
        """What to copy after these tokens, and how sure it is, from 0 to 1."""
        n, at, agreed = self.find(last)
        tokens = self.tokens[at : at + self.longest] if n else []
        if not tokens or agreed:
            return tokens, float(bool(tokens))
        if len(tokens) >= self.sure:
            return tokens, min(0.9, 0.7 + 0.2 * (len(tokens) - self.sure) / 12)
        return tokens, 0.6 * len(tokens) / self.sure

    def chain(self, most: int) -> tuple[list[int], float]:
        """The copy after the text; a sure one goes on from its own end, up to about ``most`` times its sureness."""
        chain, confidence = self.copy(self.tokens[-NGRAMS[0] :])
        going_on = confidence > 0.6
        while going_on and len(chain) < int(most * confidence):
            more, sure = self.copy([*self.tokens[-NGRAMS[0] :], *chain][-NGRAMS[0] :])
            chain = chain + more
            going_on = bool(more) and (confidence < 1 or sure >= 1)
        return chain, confidence


class Successors:
    """The k likeliest successors of every token and of every pair of tokens that was fed, as the model last saw them.

    Attributes:
        calibration: how often successors of a score were right.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.calibration = Calibration()
        self._after: dict[int, list[tuple[int, float]]] = {}
        self._after_pair: dict[tuple[int, int], list[tuple[int, float]]] = {}

    def __call__(self, before: int | None, token: int) -> list[tuple[int, float]]:
        """Successors with their scores, which add up to 1: those of the pair, else of the token."""
        pair = self._after_pair.get((before, token)) if before is not None else None
        return self._after.get(token, []) if pair is None else pair

    def update(self, before: Sequence[int | None], tokens: Sequence[int], logits: Tensor) -> None:
        """Set the rows of the tokens that were fed, each with the one before it; of several the last stays."""
        values, ids = logits.topk(min(self.k, logits.shape[-1]))
        scores = torch.softmax(values.float(), -1)
        for previous, token, row, score in zip(before, tokens, ids.tolist(), scores.tolist(), strict=True):
            self._after[token] = following = list(zip(row, score, strict=True))
            if previous is not None:
                self._after_pair.pop((previous, token), None)
                self._after_pair[previous, token] = following
        while len(self._after_pair) > MANY_PAIRS:  # the pairs that were not seen for longest
            del self._after_pair[next(iter(self._after_pair))]
