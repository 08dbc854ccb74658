"""ADED's Monte-Carlo tree search for likely continuations in a table of trigrams."""

from __future__ import annotations

import random
from bisect import bisect_left
from functools import lru_cache
from itertools import accumulate
from math import log, sqrt
from operator import itemgetter

from .trigrams import Trigrams

_C1, _C2 = 32.0, 8.0  # how much the search explores


class _Place:
    """Two tokens in the search tree, with the visits and rewards of what follows them."""

    __slots__ = ("after", "bonus", "count", "fresh", "mean", "pair", "path", "reward", "tokens", "values", "visits")

    def __init__(self, pair: tuple[int, int], path: tuple[int, ...]) -> None:
        self.pair, self.path, self.visits = pair, path, 0
        self.after: list[_Place | None] = []  # None until visited

    def expand(self, tokens: list[int], values: list[float]) -> None:
        n = len(tokens)
        self.tokens, self.values, self.after = tokens, values, [None] * n
        self.count, self.reward, self.mean, self.bonus = [0] * n, [0.0] * n, [0.0] * n, [0.0] * n
        self.fresh = n  # children never visited: first the last one, then the others in order

    def choose(self, urge: float) -> int:
        """Which child to go to."""
        n = len(self.after)
        if self.fresh:
            self.fresh -= 1
            return n - 1 if self.fresh == n - 1 else n - 2 - self.fresh
        if n == 1:
            return 0
        scores = [mean + urge * bonus for mean, bonus in zip(self.mean, self.bonus, strict=True)]
        return scores.index(max(scores))

    def reach(self, i: int) -> _Place:
        """A child."""
        place = self.after[i]
        if place is None:
            token = self.tokens[i]
            place = self.after[i] = _Place((self.pair[1], token), (*self.path, token))
        return place

    def note(self, i: int, reward: float) -> None:
        """A round went through this child."""
        self.visits += 1
        self.count[i] = n = self.count[i] + 1
        self.reward[i] = w = self.reward[i] + reward
        self.mean[i], self.bonus[i] = w / n, self.values[i] / (1 + n)


def search(
    table: Trigrams, pair: tuple[int, int], draws: random.Random, rounds: int = 150, most: int = 24, words: int = 3
) -> list[tuple[tuple[int, ...], int]]:
    """The ``most`` continuations of two tokens, of up to ``words`` tokens, that a search came by most, and how often.

    A round goes down from the root: first to children that were never visited, then to the one with the largest
    ``W/n + (c1 + ln((N + c2 + 1) / c2)) P sqrt(N) / (1 + n)``, for n visits with rewards W, N visits of the parent, and
    the table's value P. It adds all successors of where it ends, and goes on by drawing successors in proportion to
    their values. The reward is 1 plus the values along the way. The empty continuation, with all visits, comes first.
    """
    root = _Place(pair, ())
    urge = _urge(rounds)
    rows: dict[tuple[int, int], tuple[list[int], list[float], list[float]]] = {}

    def row_of(at: tuple[int, int]) -> tuple[list[int], list[float], list[float]]:
        if at not in rows:
            row = table[at]
            rows[at] = list(row), list(row.values()), list(accumulate(row.values()))
        return rows[at]

    for _ in range(rounds):
        place, reward, new = root, 1.0, False
        way: list[tuple[_Place, int]] = []
        while len(way) < words and not new:
            if not place.after:
                tokens, values, _sums = row_of(place.pair)
                if not tokens:
                    break
                place.expand(tokens, values)
                new = True
            i = place.choose(urge[place.visits])
            way.append((place, i))
            reward += place.values[i]
            place = place.reach(i)
        at = place.pair
        for _step in range(words - len(way)):
            tokens, values, sums = row_of(at)
            if not tokens:
                break
            i = bisect_left(sums, draws.random() * sums[-1]) if len(tokens) > 1 else 0
            reward += values[i]
            at = at[1], tokens[i]
        place.visits += 1
        for above, i in way:
            above.note(i, reward)
    return _most_visited(root, most)


@lru_cache(maxsize=8)
def _urge(rounds: int) -> list[float]:
    return [(_C1 + log((n + _C2 + 1) / _C2)) * sqrt(n) for n in range(rounds + 1)]


def _most_visited(root: _Place, most: int) -> list[tuple[tuple[int, ...], int]]:
    """Paths with their visits; of those with as many, the one found first going down from the root in order."""
    found: list[tuple[int, _Place, int]] = []
    never: list[tuple[int, _Place, int]] = []
    stack: list[_Place] = [root]
    while stack:
        place = stack.pop()
        for i, count in enumerate(place.count if place.after else ()):
            (found if count else never).append((count, place, i))
        stack += [after for after in reversed(place.after) if after is not None and after.after]
    best = sorted(found, key=itemgetter(0), reverse=True)[: most - 1]
    best += never[: most - 1 - len(best)]
    return [((), root.visits), *(((*place.path, place.tokens[i]), count) for count, place, i in best)]
