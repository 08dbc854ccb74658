"""Reducing again while the text grows: the parameter that these methods share."""

from __future__ import annotations

from ..core.budget import Budget
from ..core.errors import ThriftError


def check_every(name: str, every: int, budget: int | float) -> None:
    """Refuse a negative ``every``, and one beside a ratio: every reduction would keep that share of the last one."""
    if every < 0:
        raise ThriftError(f"{name} needs every >= 0, the tokens between two reductions (0: reduce once), got {every}")
    if every and Budget.of(budget).count is None:
        raise ThriftError(
            f"{name}(every={every}) keeps a fixed number of entries: give a count such as budget=512, not {budget}"
        )
