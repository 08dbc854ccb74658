"""What a user may ask of a compression: a share of the tokens, a number of them, or what they may cost."""

from __future__ import annotations

import math
from typing import Any

from ..core.budget import Budget
from ..core.errors import ThriftError


def budget_of(
    rate: float | int | None = None,
    tokens: int | None = None,
    price: float | None = None,
    spend: float | None = None,
) -> float | int | None:
    """The one target that was given, as a method's ``rate``: a float is a share, an int a count; None if none was.

    Args:
        rate: a share in (0, 1], or an int.
        tokens: a count of at least 1.
        price: of a million tokens, in any currency.
        spend: what the text may cost at that price.

    Raises:
        ThriftError: it is no such number, or two targets are given.
    """
    if (price is None) != (spend is None):
        raise ThriftError(
            "a target in money needs both: price= of a million tokens, and spend=, what the text may cost"
        )
    given = [name for name, value in (("rate", rate), ("tokens", tokens), ("spend", spend)) if value is not None]
    if len(given) > 1:
        raise ThriftError(f"{' and '.join(given)} are two targets: give one of them")
    if tokens is not None:
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
            raise ThriftError(f"tokens={tokens!r} is no number of tokens: give an int of at least 1, or a rate")
        return tokens
    if price is not None and spend is not None:
        for name, value in (("price", price), ("spend", spend)):
            if not _is_money(value):
                raise ThriftError(f"{name}={value!r} is no amount of money: give a number above 0")
        bought = math.floor(spend / price * 1e6 * (1 + 1e-12))  # 0.3 / 3 is not quite 0.1
        if bought < 1:
            raise ThriftError(f"spend={spend} at {price} for a million tokens buys no token: spend more")
        return bought
    if rate is not None:
        Budget.of(rate)
    return rate


def _is_money(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
