"""How much to draft: as long as one more guess brings more tokens than it costs time, measured on this machine."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

from ..core.draft import NOTHING, Draft

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
"""Numbers of tokens in a forward whose times are kept apart; between them times are interpolated."""
SLOPE = 0.05
"""Before anything is measured, a further token costs so much of a forward of one: less than on most machines, so that
wide forwards are tried, and measured."""
SAMPLES, TRUSTED = 6, 3
PAUSE = (4, 64)
"""Plain steps after drafting was found to lose: at first, and at most."""


class StepTimes:
    """Seconds of a model's forward by the number of tokens in it, as last seen: the calibration of the machine."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}

    def knows(self, tokens: int) -> bool:
        """Whether forwards of so many tokens were timed often enough to be believed."""
        return len(self._seen.get(_width(tokens), ())) >= TRUSTED

    def note(self, tokens: int, seconds: float) -> None:
        """A forward of so many tokens took so long."""
        self._seen.setdefault(_width(tokens), deque(maxlen=SAMPLES)).append(seconds)

    def __call__(self, tokens: int) -> float:
        """The estimate for so many tokens; without any measurement in forwards of one.

        It may fall where there are more: products of two or three rows can take longer than those of eight.
        """
        known = {w: sorted(times)[len(times) // 4] for w, times in self._seen.items()}
        if not known:
            return 1 + SLOPE * (tokens - 1)
        trusted = sorted(w for w in known if len(self._seen[w]) >= TRUSTED) or sorted(known)
        at = bisect_left(trusted, tokens)
        if at == len(trusted) or trusted[at] == tokens or at == 0:
            near = trusted[min(at, len(trusted) - 1)]
            guess = known[near] * (1 + SLOPE * (tokens - 1)) / (1 + SLOPE * (near - 1))
        else:
            low, high = trusted[at - 1], trusted[at]
            guess = known[low] + (known[high] - known[low]) * (tokens - low) / (high - low)
        # A width seen once or twice may have been unlucky: believe it only where it was faster than expected.
        return min(guess, known.get(tokens, guess))


def _width(tokens: int) -> int:
    return min(WIDTHS, key=lambda w: abs(w - tokens) / w)


_times: WeakKeyDictionary[Any, StepTimes] = WeakKeyDictionary()
"""Of each model, for as long as it lives: what one call learned serves the next."""


class Planner:
    """Cuts drafts that come with chances to what pays; leaves the others, and those that were drawn, as they are.

    A forward over the last tokens of A rows and N guesses commits A tokens and, on average, the sum of the guesses'
    chances. N is where that, divided by the time of such a forward, is largest; the likeliest guesses of all rows
    make it. When drafting turned out slower than plain steps all the same (a slow drafter, wrong chances), it pauses.

    Args:
        free: whether rows may differ and drafts be trees; else all become chains of one length.
        model: whose forwards are timed.
    """

    def __init__(self, free: bool, model: Any = None) -> None:
        self.free = free
        self.times = StepTimes() if model is None else _times.setdefault(model, StepTimes())
        self._resting, self._pause = 0, PAUSE[0]
        self._balance = 0.0  # seconds won by drafting of late

    def rests(self) -> bool:
        """Whether this step is to be a plain one, without asking for drafts."""
        self._resting = max(self._resting - 1, 0)
        return self._resting > 0

    def cut(self, drafts: Sequence[Draft | None]) -> list[Draft | None]:
        """What to verify of the drafts; rows that are done have None.

        Nothing until plain steps have been timed, if there are chances to weigh: they are what drafting is measured by.
        """
        rows = sum(draft is not None for draft in drafts)
        if not self.times.knows(rows) and any(draft is not None and draft.chances is not None for draft in drafts):
            return [None if draft is None else NOTHING for draft in drafts]
        return self._trees(drafts) if self.free else self._chains(drafts)

    def note(self, drafts: Sequence[Draft | None], committed: int, draft_seconds: float, seconds: float) -> None:
        """A step with these drafts committed so many tokens; ``seconds`` is the forward and all after it."""
        rows = sum(draft is not None for draft in drafts)
        nodes = sum(len(draft) for draft in drafts if draft is not None)
        self.times.note(rows + nodes, seconds)
        if all(draft is None or draft.chances is None for draft in drafts):
            return
        plain = self.times(rows) * committed / max(rows, 1)
        self._balance = 0.9 * self._balance + plain - seconds - draft_seconds
        if self._balance < -4 * self.times(rows):
            self._resting, self._pause = self._pause, min(2 * self._pause, PAUSE[1])
            self._balance = 0.0
        elif self._balance > 0:
            self._pause = PAUSE[0]

    def _trees(self, drafts: Sequence[Draft | None]) -> list[Draft | None]:
        rows = sum(draft is not None for draft in drafts)
        fixed = sum(len(draft) for draft in drafts if draft is not None and not _cuttable(draft))
        open_ = [draft.chances or () for draft in drafts if draft is not None and _cuttable(draft)]
        chances = sorted((chance for row in open_ for chance in row), reverse=True)
        n = self._best(rows + fixed, [1] * len(chances), [0.0, *accumulate(chances)], rows)
        least = chances[n - 1] if n else float("inf")
        out: list[Draft | None] = []
        for draft in drafts:
            if draft is not None and _cuttable(draft):
                draft = draft.only([i for i, chance in enumerate(draft.chances or ()) if chance >= least])
            out.append(draft)
        return out

    def _chains(self, drafts: Sequence[Draft | None]) -> list[Draft | None]:
        live = [draft.best_chain(10**6) for draft in drafts if draft is not None]
        width = min((len(draft) for draft in live), default=0)
        if all(_cuttable(draft) for draft in live):
            together = [1.0] * width
            for draft in live:
                together = [a * b for a, b in zip(together, draft.chances or (), strict=False)]
            gains = [0.0, *accumulate(len(live) * chance for chance in together)]
            width = self._best(len(live), [len(live)] * width, gains, len(live))
        cut = iter(draft.only(range(width)) for draft in live)
        return [None if draft is None else next(cut) for draft in drafts]

    def _best(self, fed: int, more: Sequence[int], gains: Sequence[float], rows: int) -> int:
        """The number of guesses (or levels of them) with the most tokens a second."""
        widths = [fed, *accumulate(more, initial=fed)][1:]
        rates = [(rows + gain) / self.times(width) for width, gain in zip(widths, gains, strict=True)]
        return max(range(len(rates)), key=rates.__getitem__)


def _cuttable(draft: Draft) -> bool:
    """Whether guesses may go by their chances: not where they were drawn, which would bend the law of the output."""
    return draft.chances is not None and not draft.drawn
