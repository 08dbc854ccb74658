"""What drafters that copy or count share: how far their guesses can be trusted, learned from what came of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from ..core.errors import ThriftError

SURE = 0.995
"""No single guess is trusted more than this."""
MATCHES = (0.1, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
"""How often what followed a match of 1, 2, ... tokens is right, before a text has shown how it is there."""
HOPELESS = 0.01
"""Guesses with a smaller chance are not worth making."""


class Shares:
    """How large a share of the guesses of each kind was right of late.

    Args:
        first: the share of each kind before anything is seen.
        rate: weight of the newest guess, at least.
        worth: ``first`` counts as so many guesses, so that early ones weigh more; None: all weigh the same.
    """

    def __init__(self, first: Sequence[float], rate: float, worth: int | None = None) -> None:
        self.values, self.rate = list(first), rate
        self._weights = [0 if worth is None else worth] * len(self.values)

    def note(self, kind: int, right: bool) -> None:
        """A guess of this kind was right, or not."""
        rate = self.rate
        if self._weights[kind]:
            self._weights[kind] += 1
            rate = max(rate, 1 / self._weights[kind])
        self.values[kind] += rate * (right - self.values[kind])


class Trust:
    """How often what followed a match of n tokens was right; longer matches than ``longest`` count as that long."""

    def __init__(self, longest: int) -> None:
        first = (*MATCHES[:longest], *MATCHES[-1:] * (longest - len(MATCHES)))
        self._shares = Shares(first, rate=1 / 16, worth=4)

    def note(self, n: int, right: bool) -> None:
        """The guess after a match of ``n`` tokens was right, or not."""
        self._shares.note(min(n, len(self._shares.values)) - 1, right)

    def chances(self, n: int, guesses: int, least: float = HOPELESS) -> list[float]:
        """Of so many guesses after a match of ``n`` tokens, as long as they are not below ``least``.

        Each guess that is right makes the match a token longer.
        """
        shares = self._shares.values[min(n, len(self._shares.values)) - 1 :]
        shares = [min(share, SURE) for share in shares[:guesses]]
        shares += shares[-1:] * (guesses - len(shares))
        chances = list(accumulate(shares, mul))
        while chances and chances[-1] < least:
            chances.pop()
        return chances


class Calibration:
    """How often guesses were right that some table gave a score between 0 and 1, by the score."""

    KINDS = 8

    def __init__(self) -> None:
        self._shares = Shares([((i + 0.5) / self.KINDS) ** 2 for i in range(self.KINDS)], rate=1 / 32)

    def note(self, score: float, right: bool) -> None:
        """A guess with this score was right, or not."""
        self._shares.note(self._kind(score), right)

    def __call__(self, score: float) -> float:
        """The chance of a guess with this score."""
        return min(self._shares.values[self._kind(score)], SURE)

    def _kind(self, score: float) -> int:
        return min(int(score**0.5 * self.KINDS), self.KINDS - 1)  # finer where scores are small


def whole(method: str, least: int = 1, **given: object) -> None:
    """Raise ThriftError unless all parameters are whole numbers of at least ``least``."""
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ThriftError(f"{method} needs {name} as a whole number of at least {least}, not {value!r}")
