"""Which units of a text to keep within a budget of tokens. Shared by the methods that score units."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from ..core.budget import Budget
from ..ops.tokens import Span, count_tokens
from .spans import join


def best_within(
    text: str, units: Sequence[Span], scores: Sequence[float], rate: Budget | float | int, tokenizer: Any
) -> list[Span]:
    """The best-scored units whose text has at most ``rate`` of the tokens of ``text``, in the order of the text.

    As many units of the ranking as fit, and at least one. The count is that of the text that results, made by the
    tokenizer itself, not a sum over units: joining units can change how they are tokenised. Of equal scores the earlier
    unit is kept, and a smaller rate keeps a subset of what a larger one keeps.
    """
    total = count_tokens(tokenizer, text)
    target = Budget.of(rate).tokens(total)
    if target >= total:
        return list(units)
    ranking = sorted(range(len(units)), key=lambda i: (-scores[i], i))

    def best(k: int) -> list[Span]:
        return [units[i] for i in sorted(ranking[:k])]

    sizes = range(1, len(units) + 1)
    fitting = bisect_right(sizes, target, key=lambda k: count_tokens(tokenizer, join(text, best(k))))
    return best(max(fitting, 1))
