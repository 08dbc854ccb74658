"""Runs the text stage: methods in sequence, their maps composed, and what they left checked."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.plan import Step
from ..core.tokenmap import TokenMap
from ..core.view import Lazy, View
from ..ops.tokens import Span, token_ends
from .compressed import CompressedText
from .protect import Protected, Protection, missing, with_white_space
from .selection import Terms, best_within, under
from .spans import bridges, join, map_to_spans, merged, sentences, spans_to_map, words


def compress_text(
    methods: Sequence[Any],
    text: str,
    question: str | None,
    tokenizer: Any,
    scorer: Any = None,
    embedder: Any = None,
    *,
    protect: Protection | None = None,
    min_saving: int | float = 0,
    max_loss: float | None = None,
    chunk: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CompressedText:
    """Apply text methods one after the other, each to what the one before it left.

    Without ``protect`` the methods run as they are. With a policy, even an empty one, their result is checked: it is
    made of spans of the text, is not empty, and has every protected span; else it is mended, or the text is returned
    as it was. ``notes`` of the result say which.

    Args:
        methods: instances, as ``plan.at("text")`` gives them; none leaves the text as it is.
        text: the prompt.
        question: what will be asked about it, for methods that look at it.
        tokenizer: the fast tokenizer that defines what a token is.
        scorer, embedder: a ``Scorer`` and an ``Embedder``; or ``Lazy`` ones, made only if a method needs them.
        protect: what must survive.
        min_saving: the text is returned as it was if less is saved: tokens, or as a float a share of them.
        max_loss: the same if the predicted loss is larger.
        chunk: score so many tokens at a time; the selection is one over all of them.
        progress: called with (tokens done, tokens in all) after every chunk.

    Raises:
        ThriftError: what is given is no text or no such number, or a method cannot work by chunks.
    """
    _check_text(text)
    _check_limits(min_saving, max_loss, chunk)
    terms = Terms(protect or Protection(), text)
    terms.spans = terms.protection.find(text)
    found = list(terms.spans)
    made = _Result(
        text, lambda: terms.count(tokenizer, text), " ".join(str(Step("text", method)) for method in methods), found
    )
    if not text.strip():
        made.notes.append("there is nothing in the text to compress")
    if min_saving and (saving := made.before - _target(methods, made.before)) < made.least(min_saving):
        return made.unchanged(f"at most {saving} tokens could be saved, less than min_saving")

    view = View(text=text, question=question, tokenizer=tokenizer, scorer=scorer, embedder=embedder)
    whole: TokenMap | None = None
    for method in methods:
        terms.text = view.text
        view.offer("protected_spans", list(terms.spans))
        view.require(method.info.needs)
        for need in method.info.needs:
            getattr(view, need)  # models load before the clock runs
        terms.kept_mass.clear()
        if hasattr(method, "prepare"):
            method.prepare(view)  # so do those that a method was given by name
        start = time.perf_counter()
        with under(terms):
            step = method.reduce(view) if chunk is None else _by_chunks(method, view, chunk, progress)
        made.seconds += time.perf_counter() - start
        whole = step if whole is None else whole.then(step)
        kept = map_to_spans(step)
        made.expect(terms.kept_mass, unchanged=kept == [(0, len(view.text))] or not view.text)
        terms.spans = carried(terms.spans, kept)
        view.offer("text", join(view.text, kept))
    made.notes += terms.notes
    if whole is None:
        return made.unchanged()

    kept = map_to_spans(whole)
    if protect is not None:
        kept, problem = _mended(text, kept, found, made.notes, protect.whole)
        if problem:
            return made.unchanged(problem)
        if merged(kept) != map_to_spans(whole):
            whole = spans_to_map(kept, len(text))
    result = join(text, kept)
    after = terms.count(tokenizer, result)
    if made.before - after < made.least(min_saving):
        return made.unchanged(f"{max(made.before - after, 0)} tokens would be saved, less than min_saving")
    if max_loss is not None and made.loss is not None and made.loss > max_loss:
        return made.unchanged(f"the predicted loss of {made.loss:.2f} is more than max_loss={max_loss}")
    target = _target(methods, made.before)
    if protect is not None and not made.notes and 0 < target < after:
        made.notes.append(f"{after} tokens are left, more than the {target} asked for")
    return made.compressed(result, kept, after, whole)


class _Result:
    """What is known of the result so far."""

    def __init__(self, text: str, count: Callable[[], int], method: str, protected: list[Protected]) -> None:
        self.text, self._count, self.method, self.protected = text, count, method, protected
        self.notes: list[str] = []
        self.seconds = 0.0
        self.loss: float | None = 0.0

    @cached_property
    def before(self) -> int:
        return self._count()

    def least(self, saving: int | float) -> float:
        return saving * self.before if isinstance(saving, float) else saving

    def expect(self, kept_mass: Sequence[float], unchanged: bool) -> None:
        """Take one method's choices into the predicted loss, which is unknown once a method does not go by scores."""
        if unchanged or self.loss is None:
            return
        self.loss = 1 - (1 - self.loss) * float(np.mean(kept_mass)) if kept_mass else None

    def unchanged(self, note: str | None = None) -> CompressedText:
        if note is not None:
            self.notes.append(f"{note}: the text is returned as it was")
        self.loss = 0.0
        n = len(self.text)
        return self.compressed(self.text, [(0, n)] if n else [], self.before, TokenMap.identity(n))

    def compressed(self, text: str, kept: Sequence[Span], after: int, map: TokenMap) -> CompressedText:
        return CompressedText(
            text=text,
            original=self.text,
            kept=merged(kept),
            tokens_before=self.before,
            tokens_after=after,
            map=map,
            seconds=self.seconds,
            method=self.method,
            notes=tuple(dict.fromkeys(self.notes)),
            predicted_loss=self.loss,
            protected=self.protected,
        )


def _mended(
    text: str, kept: list[Span], protected: list[Protected], notes: list[str], whole: bool
) -> tuple[list[Span], str | None]:
    """The spans with the protected ones that are missing, or why they cannot be used."""
    in_order = all(a[1] <= b[0] for a, b in pairwise(kept))
    if not in_order:
        if any(a[1] > b[0] for a, b in pairwise(sorted(kept))):
            return kept, "the method repeats parts of the text"
        notes.append("the method changed the order of the text")
    if text.strip() and not join(text, kept).strip():
        return kept, "the method kept nothing"
    lost = missing(text, protected, sorted(kept), whole)
    if not lost:
        return kept, None
    if not in_order:
        return kept, f"{len(lost)} protected spans did not survive"
    mended = bridges(text, _union(kept, with_white_space(text, lost)))
    notes.append(f"{len(lost)} protected spans were added to what the method kept")
    if missing(text, protected, merged(mended), whole):
        return kept, "protected spans did not survive"
    return mended, None


def _union(one: Iterable[Span], other: Iterable[Span]) -> list[Span]:
    out: list[Span] = []
    for start, end in sorted([*one, *other]):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def _places(spans: Sequence[Protected], kept: Sequence[Span]) -> list[int | None]:
    """In which of the kept spans, which are sorted, each span lies as a whole."""
    starts = [start for start, _ in kept]
    at = [bisect_right(starts, span.start) - 1 for span in spans]
    return [i if i >= 0 and span.end <= kept[i][1] else None for i, span in zip(at, spans, strict=True)]


def carried(spans: Sequence[Protected], kept: Sequence[Span]) -> list[Protected]:
    """Where in the text of ``kept`` the spans are that survived."""
    ordered = sorted(range(len(kept)), key=kept.__getitem__)
    begins = np.concatenate([[0], np.cumsum([end - start for start, end in kept])]) if kept else np.zeros(1)
    out = []
    for span, i in zip(spans, _places(spans, [kept[i] for i in ordered]), strict=True):
        if i is not None:
            shift = int(begins[ordered[i]]) - kept[ordered[i]][0]
            out.append(span._replace(start=span.start + shift, end=span.end + shift))
    return sorted(out)


def _target(methods: Sequence[Any], tokens: int) -> int:
    """Tokens that the methods' rates leave; methods without one, or with another limit beside it, may leave none."""
    for method in methods:
        rate = getattr(method, "rate", None)
        tokens = 0 if rate is None or getattr(method, "limited", False) else Budget.of(rate).tokens(tokens)
    return tokens


# ---- long texts by chunks -------------------------------------------------------------------------------------------


def _by_chunks(method: Any, view: View, size: int, progress: Callable[[int, int], None] | None) -> TokenMap:
    """Scores chunk by chunk, then one selection over all units."""
    text = view.text
    name = method.info.name
    rate = getattr(method, "rate", None)
    if rate is None:
        raise ThriftError(f"{name} has no rate to share between chunks: leave chunk out")
    units: list[Span] = []
    scores: list[float] = []
    unknown: list[int] = []  # units that were never compared with others: a chunk of a single one
    chunks = chunks_of(text, size, view.tokenizer)
    total = chunks[-1][2] if chunks else 0
    for start, end, done in chunks:
        part = View(**{part: Lazy(partial(getattr, view, part)) for part in view})
        part.offer("text", text[start:end])
        part.offer("protected_spans", [])
        asked = Terms(collect=[])
        with under(asked):
            step = method.reduce(part)
        if len(asked.collect or ()) > 1 or (not asked.collect and map_to_spans(step) != [(0, end - start)]):
            raise ThriftError(f"{name} does not choose by scores alone, so it cannot work by chunks: leave chunk out")
        if not asked.collect:
            unknown.append(len(units))
        for found, values in asked.collect or [([(0, end - start)], [0.0])]:
            units += [(start + a, start + b) for a, b in found]
            scores += values
        if progress is not None:
            progress(done, total)
    known = np.delete(np.asarray(scores, dtype=np.float64), unknown)
    known = known[np.isfinite(known)]
    for i in unknown:
        scores[i] = float(known.mean()) if len(known) else 0.0
    return spans_to_map(best_within(text, units, scores, rate, view.tokenizer), len(text))


def chunks_of(text: str, size: int, tokenizer: Any) -> list[tuple[int, int, int]]:
    """Runs of whole sentences of at most ``size`` tokens, or of words where a sentence has more: start, end, and the
    tokens up to there."""
    ends = token_ends(tokenizer, text)

    def tokens(at: int) -> int:
        return int(np.searchsorted(ends, at, side="right"))

    edges: list[int] = []
    for start, end in sentences(text):
        long = tokens(end) - tokens(start) > size
        edges += [start + stop for _, stop in words(text[start:end])] if long else [end]
    out: list[tuple[int, int, int]] = []
    begin = 0
    for edge, following in pairwise([*edges, len(text) + 1]):
        if edge == edges[-1] or tokens(min(following, len(text))) - tokens(begin) > size:
            out.append((begin, edge, tokens(edge)))
            begin = edge
    return out


# ---- mistakes -------------------------------------------------------------------------------------------------------


def _check_text(text: Any) -> None:
    if isinstance(text, bytes | bytearray):
        raise ThriftError("compress takes a text (str), not bytes: decode them first, e.g. data.decode('utf-8')")
    if not isinstance(text, str):
        raise ThriftError(f"compress takes a text (str), not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ThriftError(
            f"the text has half of a character at {error.start} (a lone surrogate, of bytes that were no UTF-8): "
            "decode the bytes with their own encoding, or with errors='replace'"
        ) from None


def _check_limits(min_saving: Any, max_loss: Any, chunk: Any) -> None:
    number = isinstance(min_saving, int | float) and not isinstance(min_saving, bool)
    if not number or not min_saving >= 0 or (isinstance(min_saving, float) and min_saving > 1):
        raise ThriftError(f"min_saving={min_saving!r} is no saving: give tokens, such as 100, or a share, such as 0.1")
    if max_loss is not None and not (isinstance(max_loss, int | float) and 0 <= max_loss <= 1):
        raise ThriftError(f"max_loss={max_loss!r} is outside [0, 1]: 0.5 allows half of the score mass to be lost")
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise ThriftError(f"chunk={chunk!r} is no number of tokens: give one such as 8000")
