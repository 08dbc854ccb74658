"""Which units of a text to keep within a budget of tokens. Shared by the methods that score units."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..ops.tokens import Span, count_tokens, token_ends
from .protect import IN_PAIRS, Protected, Protection, blocks_of, held, with_white_space
from .spans import bridges, join


@dataclass
class Terms:
    """What the runtime asks of every selection made while a method runs, and what selections report back.

    Attributes:
        protection: the policy; ``spans`` are the protected spans of ``text``, the whole text that the method sees.
        text, spans: see above. Another text than this one, e.g. one of several documents, is searched anew.
        collect: scores go here and everything is kept: the runtime selects later, over all chunks at once.
        notes: what the user should know of the choice.
        kept_mass: share of the score mass that was kept, one number a selection.
    """

    protection: Protection = field(default_factory=Protection)
    text: str = ""
    spans: list[Protected] = field(default_factory=list)
    collect: list[tuple[Sequence[Span], Sequence[float]]] | None = None
    notes: list[str] = field(default_factory=list)
    kept_mass: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    ends: dict[str, np.ndarray] = field(default_factory=dict)

    def protected(self, text: str) -> list[Protected]:
        if not self.protection:
            return []
        return self.spans if text == self.text else self.protection.find(text)

    def count(self, tokenizer: Any, text: str) -> int:
        """Tokens of a text, counted once."""
        if text in self.ends:
            return len(self.ends[text])
        if text not in self.counts:
            self.counts[text] = count_tokens(tokenizer, text)
        return self.counts[text]

    def token_ends(self, tokenizer: Any, text: str) -> np.ndarray | None:
        """Where the tokens end, found once; None from a tokenizer that cannot say."""
        if not getattr(tokenizer, "is_fast", False):
            return None
        if text not in self.ends:
            self.ends[text] = token_ends(tokenizer, text)
        return self.ends[text]


_terms: ContextVar[Terms | None] = ContextVar("terms", default=None)


@contextmanager
def under(terms: Terms) -> Iterator[None]:
    """Selections inside the ``with`` block, in this thread or task, are made on these terms."""
    token = _terms.set(terms)
    try:
        yield
    finally:
        _terms.reset(token)


def best_within(
    text: str,
    units: Sequence[Span],
    scores: Sequence[float],
    rate: Budget | float | int,
    tokenizer: Any,
    *,
    protect: Sequence[Span] | None = None,
    fill: bool = True,
) -> list[Span]:
    """The best-scored units whose text has at most ``rate`` of the tokens of ``text``, in the order of the text.

    As many units of the ranking as fit, then the best of the others that still fit into what is left, so that less than
    one unit of the budget is unused. The count is that of the text that results, made by the tokenizer itself: joining
    units can change how they are tokenised. Of equal scores the earlier unit is kept. Where no unit fits, the best one
    is kept alone. What keeps units apart where something was left out is kept too, as spans of their own
    (``spans.bridges``).

    Protected spans are kept first, whatever their units score: units are divided at them, except that numbers,
    negations and quotes go with their sentence where that is a unit. If the protected spans alone exceed the budget,
    they alone are kept, over budget, and the result says so; or, if the policy is to keep spans ``whole`` and not all,
    the best sentences and blocks, each with all that is protected in it, and all tags and placeholders.

    The text is tokenised as a whole a few times only: every unit's cost is read off the first tokenisation, the length
    of the ranking is found by interpolation between true counts, and single units are added by counting their
    neighbourhood. One true count at the end confirms the sum, or units are taken out again until it fits.

    Args:
        text: any text.
        units: spans that are kept or dropped as a whole, in order and disjoint.
        scores: one number a unit; not a number ranks last.
        rate: the budget.
        tokenizer: defines what a token is.
        protect: spans to keep in any case; those of the policy that the runtime was given when None.
        fill: False keeps a plain prefix of the ranking: then a smaller rate keeps a subset of what a larger one keeps.
    """
    terms = _terms.get() or Terms()
    if len(scores) != len(units):
        raise ThriftError(f"{len(units)} units need as many scores, got {len(scores)}: give one score a unit")
    if terms.collect is not None:
        terms.collect.append((units, scores))
        return list(units)
    ends = terms.token_ends(tokenizer, text)
    total = terms.count(tokenizer, text) if ends is None else len(ends)
    target = Budget.of(rate).tokens(total)
    if target >= total:
        terms.kept_mass.append(1.0)
        return list(units)

    if protect is None:
        shells = with_white_space(text, held(text, terms.protected(text), units))
    else:
        shells = with_white_space(text, [Protected(a, b, "") for a, b in sorted(protect)])
    choice = _Choice(text, units, shells, tokenizer, terms.count, ends)
    if protect is None and terms.protection.whole and choice.held_tokens() > target:
        protected = terms.protected(text)
        blocks = blocks_of(text, protected)
        scores, units = _mean_scores(text, units, scores, blocks, ends), blocks
        tags = with_white_space(text, [p for p in protected if p.kind in IN_PAIRS])
        choice = _Choice(text, units, tags, tokenizer, terms.count, ends)
        terms.notes.append("the protected spans alone are more than was asked for: some are left out, whole")
    ranking = choice.ranked(scores)
    kept = choice.select(ranking, target, fill)
    if choice.note:
        may_go = choice.over and protect is None and not terms.protection.whole
        terms.notes.append(choice.note + (HINT if may_go else ""))
    terms.kept_mass.append(choice.kept_mass(scores))
    return kept


def keeps_all(text: str, units: Sequence[Span], rate: Budget | float | int, tokenizer: Any) -> bool:
    """Whether :func:`best_within` would keep every unit whatever the scores, so that no model has to be asked.

    Never where scores are collected chunk by chunk: a chunk does not know the budget of the whole.
    """
    budget = Budget.of(rate)
    if len(units) < 2 or budget.ratio == 1:
        return True
    if collecting():
        return False
    total = (_terms.get() or Terms()).count(tokenizer, text)
    return budget.tokens(total) >= total


def collecting() -> bool:
    """Whether scores are collected chunk by chunk, for one choice at the end that goes by the rate alone."""
    terms = _terms.get()
    return terms is not None and terms.collect is not None


class _Choice:
    """Units of a text, cut into pieces at protected spans, and which of them are kept so far.

    A piece is what lies between two neighbouring edges of units and protected spans; it belongs to a unit, or is
    protected, or both. ``kept`` lists the kept pieces in order.
    """

    def __init__(
        self,
        text: str,
        units: Sequence[Span],
        shells: Sequence[Span],
        tokenizer: Any,
        count: Callable[[Any, str], int],
        token_ends: np.ndarray | None,
    ) -> None:
        self.text = text
        self.tokenizer = tokenizer
        self.count = lambda spans: count(tokenizer, join(text, bridges(text, spans)))
        self.note, self.over = "", False
        unit = np.array(units, dtype=np.int64).reshape(-1, 2)
        shell = np.array(shells, dtype=np.int64).reshape(-1, 2)
        edges = np.unique(np.concatenate([unit.ravel(), shell.ravel()])) if len(shell) else None
        if edges is None:
            self.start, self.end = unit[:, 0], unit[:, 1]
        else:
            self.start, self.end = edges[:-1], edges[1:]
        self.owner = _containing(unit, self.start)
        self.held = _containing(shell, self.start) >= 0
        inside = self.held | (self.owner >= 0)
        self.start, self.end = self.start[inside], self.end[inside]
        self.owner, self.held = self.owner[inside], self.held[inside]
        self.tokens = _tokens_of(text, self.start, token_ends)
        # The pieces of each unit that are up to the scores: a slice of this order.
        free = np.flatnonzero(~self.held)
        self.free = free[np.argsort(self.owner[free], kind="stable")]
        self.first = np.searchsorted(self.owner[self.free], np.arange(len(unit) + 1))
        self.cost = np.bincount(self.owner[free], self.tokens[free], minlength=len(unit))
        self.mask = self.held.copy()

    def ranked(self, scores: Sequence[float]) -> np.ndarray:
        """The units of which something is up to the scores, best first."""
        values = np.asarray(scores, dtype=np.float64)
        order = np.argsort(np.where(np.isnan(values), np.inf, -values), kind="stable")
        return order[self.first[order] < self.first[order + 1]]

    def held_tokens(self) -> int:
        """Tokens of what is protected alone; 0 where that is all there is, as then it stays."""
        return 0 if self._all_but_blanks_held() else self.count(self._spans(self.held))

    def select(self, ranking: np.ndarray, target: int, fill: bool) -> list[Span]:
        protected = self.count(self._spans(self.mask))
        if self.mask.any() and self._all_but_blanks_held():
            self.note = "all of the text is protected: it is returned unchanged"
            return [(0, len(self.text))]
        if protected > target:
            self.note = (
                f"the protected spans alone have {protected} tokens, more than the {target} asked for: "
                "only they are kept"
            )
            self.over = True
            return self._result()
        fits, size = self._longest_prefix(ranking, target, protected)
        self._keep(ranking[:fits])
        self._add(ranking[fits:], target, size, fill)
        if not self.mask.any() and len(ranking):
            self._keep(ranking[:1])
            self.note = f"no unit has at most the {target} tokens asked for: the best one is kept"
        return self._result()

    def kept_mass(self, scores: Sequence[float]) -> float:
        """Share of the score mass that is kept: tokens times score, scores shifted to be at least 0."""
        values = np.asarray(scores, dtype=np.float64)
        finite = values[np.isfinite(values)]
        if not len(finite):
            values = np.ones(len(values))
        else:
            values = np.nan_to_num(values, nan=finite.min(), posinf=finite.max(), neginf=finite.min())
            values -= min(finite.min(), 0.0)
        if not (values > 0).any():
            values = np.ones(len(values))
        owned = self.owner >= 0
        mass = np.where(owned, values[self.owner], 0) * self.tokens if len(values) else np.zeros(len(self.owner))
        return float(mass[self.mask].sum() / mass.sum()) if mass.sum() > 0 else 1.0

    # ---- how many of the ranking ------------------------------------------------------------------------------------

    def _longest_prefix(self, ranking: np.ndarray, target: int, protected: int) -> tuple[int, int]:
        """How many units of the ranking fit, and the true count of their text; a few less in a long text."""
        estimate = np.concatenate([[0.0], np.cumsum(self.cost[ranking])])
        near = NEAR if len(self.start) > SHORT else 0  # the few that are missing then are added one by one
        low, high = 0, len(ranking) + 1  # the first fits, the second does not
        at_low, rise = protected, 1.0  # true tokens at the first, and true tokens per estimated token from there
        halve = False
        while high - low > 1 and (near == 0 or target - at_low > near):
            wanted = estimate[low] + (target - at_low - near / 2) / rise
            guess = int(np.searchsorted(estimate, wanted, side="right")) - 1
            k = min(max((low + high) // 2 if halve else guess, low + 1), high - 1)
            mask = self.mask.copy()
            mask[self._pieces(ranking[:k])] = True
            size = self.count(self._spans(mask))
            span = high - low
            rise = max((size - at_low) / max(estimate[k] - estimate[low], 1.0), 0.01)
            if size <= target:
                low, at_low = k, size
            else:
                high = k
            halve = not halve and 2 * (high - low) > span  # a guess can creep up from one side
        return low, at_low

    def _add(self, ranking: np.ndarray, target: int, size: int, fill: bool) -> None:
        """Keep more units, best first, where they fit: each is counted with its neighbours alone."""
        kept = np.flatnonzero(self.mask).tolist()
        added: list[int] = []
        misses = 0
        for unit in self._cheap(ranking, target - size) if fill else iter(ranking.tolist()):
            if size >= target or misses > MISSES:
                break
            if self.cost[unit] <= target - size + SAVED:
                more = self._growth(kept, unit)
                if size + more <= target:
                    self._keep([unit])
                    for piece in self._pieces([unit]).tolist():
                        insort(kept, piece)
                    added.append(unit)
                    size += more
                    continue
                misses += 1
            if not fill:
                break
        while added and self.count(self._spans(self.mask)) > target:  # a neighbourhood was too small to count exactly
            self.mask[self._pieces([added.pop()])] = False

    def _cheap(self, ranking: np.ndarray, room: int) -> Iterator[int]:
        """The ranking without what is too long for ``room`` tokens; slice by slice, as only the first are needed."""
        for at in range(0, len(ranking), SHORT):
            part = ranking[at : at + SHORT]
            yield from part[self.cost[part] <= room + SAVED].tolist()

    def _growth(self, kept: list[int], unit: int) -> int:
        """How many tokens longer the text gets with this unit."""
        new = self._pieces([unit]).tolist()
        left, right = bisect_left(kept, new[0]), bisect_left(kept, new[-1])
        lowest, highest, chars = left, right, 0
        while lowest > 0 and chars < AROUND:
            lowest -= 1
            chars += self.end[kept[lowest]] - self.start[kept[lowest]]
        chars = 0
        while highest < len(kept) and chars < AROUND:
            chars += self.end[kept[highest]] - self.start[kept[highest]]
            highest += 1
        before = kept[lowest:highest]
        after = sorted([*before, *new])
        sizes = []
        for pieces in (before, after):
            spans = [(int(self.start[i]), int(self.end[i])) for i in pieces]
            sizes.append(count_tokens(self.tokenizer, join(self.text, bridges(self.text, spans))))
        return sizes[1] - sizes[0]

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def _pieces(self, units: Sequence[int] | np.ndarray) -> np.ndarray:
        """The pieces of these units that are up to the scores."""
        first, last = self.first[units], self.first[np.asarray(units) + 1]
        counts = last - first
        if len(counts) and counts.max() == 1:
            return self.free[first[counts == 1]]
        offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.free[np.repeat(first, counts) + offset]

    def _keep(self, units: Sequence[int] | np.ndarray) -> None:
        self.mask[self._pieces(units)] = True

    def _spans(self, mask: np.ndarray) -> list[Span]:
        """Runs of kept pieces."""
        start, end = self.start[mask], self.end[mask]
        opens = np.concatenate([[True], start[1:] != end[:-1]]) if len(start) else np.zeros(0, dtype=bool)
        closes = np.concatenate([opens[1:], [True]]) if len(start) else opens
        return list(zip(start[opens].tolist(), end[closes].tolist(), strict=True))

    def _result(self) -> list[Span]:
        """The kept pieces one by one, so that a kept unit is found in the answer as it was given."""
        spans = zip(self.start[self.mask].tolist(), self.end[self.mask].tolist(), strict=True)
        return bridges(self.text, spans)

    def _all_but_blanks_held(self) -> bool:
        held = self._spans(self.held)
        gaps = zip([0, *(end for _, end in held)], [*(start for start, _ in held), len(self.text)], strict=True)
        return not any(self.text[a:b].strip() for a, b in gaps)


def _mean_scores(
    text: str, units: Sequence[Span], scores: Sequence[float], blocks: Sequence[Span], ends: np.ndarray | None
) -> list[float]:
    """Of each block the mean score of the units that begin in it, by their tokens; the lowest where none does."""
    starts = np.array([start for start, _ in units], dtype=np.int64)
    values = np.asarray(scores, dtype=np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    weights = np.maximum(_tokens_of(text, starts, ends), 1e-6)
    block = np.searchsorted([start for start, _ in blocks], starts, side="right") - 1
    total = np.bincount(block, weights * values, minlength=len(blocks))
    weight = np.bincount(block, weights, minlength=len(blocks))
    return np.where(weight > 0, total / np.maximum(weight, 1e-9), low).tolist()


HINT = " (with 'whole' among the kinds to protect, some are left out instead)"
SHORT = 2048
"""Pieces up to which the ranking is searched to the end by true counts, which are then cheap."""
NEAR = 64
"""Tokens that may be missing before units are added one by one, in longer texts."""
AROUND = 200
"""Characters to each side that are tokenised again to see what a unit adds."""
SAVED = 3
"""Tokens that a unit may cost less beside its new neighbours than it did where it stood."""
MISSES = 200
"""Units that turn out too long before the search for something that still fits ends."""


def _containing(spans: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The span that each point lies in, -1 for none."""
    if not len(spans):
        return np.full(len(points), -1)
    at = np.searchsorted(spans[:, 0], points, side="right") - 1
    return np.where((at >= 0) & (points < spans[at, 1]), at, -1)


def _tokens_of(text: str, starts: np.ndarray, token_ends: np.ndarray | None) -> np.ndarray:
    """Tokens by the piece that their last character lies in; by characters if that is not known."""
    if not len(starts):
        return np.zeros(0)
    if token_ends is not None:
        at = np.searchsorted(starts, token_ends - 1, side="right") - 1
        return np.bincount(at[at >= 0], minlength=len(starts)).astype(np.float64)
    return np.diff(np.append(starts, len(text))) / CHARS_PER_TOKEN


CHARS_PER_TOKEN = 4.0
"""A guess that only decides where the search for the budget begins."""
