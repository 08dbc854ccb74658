"""What methods that score sentences for a question share: the question, and a limit beside the rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.view import View
from ..ops.tokens import Span, count_tokens
from .selection import best_within, collecting
from .spans import join


def question_of(view: View, method: str) -> str:
    """The question.

    Raises:
        ThriftError: there is none.
    """
    question: str | None = view.question
    if question is None or not question.strip():
        raise ThriftError(f"{method} keeps what a question needs: give one with question=... (--question)")
    return question


def best_of_first(
    text: str, units: Sequence[Span], scores: Sequence[float], rate: float | int, tokenizer: Any, most: int | None
) -> list[Span]:
    """:func:`best_within`, but no unit that ``most`` others are better than (None: no limit); at least one is kept.

    The limit is told as a budget of tokens, so that whatever else a budget keeps is kept here too.

    Raises:
        ThriftError: there is a limit, and the text comes in chunks.
    """
    if most is None:
        return best_within(text, units, scores, rate, tokenizer)
    if collecting():
        raise ThriftError("a limit on sentences (top, threshold) holds for the whole text: leave chunk out")
    ranking = sorted(range(len(units)), key=lambda i: (-scores[i], i))
    first = join(text, [units[i] for i in sorted(ranking[: max(most, 1)])])
    target = min(Budget.of(rate).tokens(count_tokens(tokenizer, text)), count_tokens(tokenizer, first))
    return best_within(text, units, scores, max(target, 1), tokenizer)
