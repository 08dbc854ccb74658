"""One text method at several rates: its scores are computed once where it chooses by scores alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.tokens import Span
from ..text.compressed import CompressedText
from ..text.protect import Protection
from ..text.runtime import compress_text
from ..text.selection import Terms, best_within, under
from ..text.spans import spans_to_map


class Models(NamedTuple):
    """What methods look through: a tokenizer that counts, a ``Scorer``, an ``Embedder``."""

    tokenizer: Any
    scorer: Any
    embedder: Any


class AtRates:
    """A method at every rate and under every policy, as ``compress_text`` would run it.

    Models make most methods slow, and rates and policies only change what is chosen by their scores. So scores are
    computed once a text, and :meth:`agrees` tells whether that gives what the method gives: it does not where the
    scores depend on the rate, as with LLMLingua's segments, or where there are none; then the method itself runs.

    Args:
        make: gives the method at a rate.
        rates: the rates.
        models: what it looks through.
    """

    def __init__(self, make: Callable[[float], Any], rates: Sequence[float], models: Models) -> None:
        self.methods = {rate: make(rate) for rate in rates}
        self.models = models
        self.once = True

    def agrees(self, text: str, question: str | None, policies: Sequence[Protection | None] = (None,)) -> bool:
        """Whether scores computed once choose the same spans of this text; from now on they are used only if so."""
        self.once = True
        once = [out.kept for _, _, out in self.compress(text, question, policies)]
        self.once = False
        self.once = once == [out.kept for _, _, out in self.compress(text, question, policies)]
        return self.once

    def compress(
        self, text: str, question: str | None, policies: Sequence[Protection | None] = (None,)
    ) -> Iterator[tuple[float, int, CompressedText]]:
        """``(rate, number of the policy, result)`` for each of them; the policy None: as published, nothing checked."""
        scored = self._scored(text, question) if self.once else None
        for rate, method in self.methods.items():
            for i, policy in enumerate(policies):
                used = method if scored is None else _Scored(method, *scored)
                yield rate, i, compress_text([used], text, question, *self.models, protect=policy)

    def _scored(self, text: str, question: str | None) -> tuple[Sequence[Span], Sequence[float]] | None:
        """The units and their scores; None where the method does not make one choice by scores."""
        tokenizer, scorer, embedder = self.models
        view = View(text=text, question=question, tokenizer=tokenizer, scorer=scorer, embedder=embedder)
        view.offer("protected_spans", [])
        terms = Terms(collect=[])
        with under(terms):
            next(iter(self.methods.values())).reduce(view)
        return terms.collect[0] if terms.collect is not None and len(terms.collect) == 1 else None


class _Scored:
    """A method of which it is known already how it scores a text."""

    def __init__(self, method: Any, units: Sequence[Span], scores: Sequence[float]) -> None:
        self._method, self._units, self._scores = method, units, scores

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def reduce(self, view: View) -> TokenMap:
        kept = best_within(view.text, self._units, self._scores, self._method.rate, view.tokenizer)
        return spans_to_map(kept, len(view.text))
