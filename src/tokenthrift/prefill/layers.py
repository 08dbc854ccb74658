"""Layers that a method is told to act at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.errors import ThriftError


def ascending(method: str, layers: Any, example: str) -> tuple[int, ...]:
    """The layers, checked.

    Raises:
        ThriftError: they are no numbers from 0 on in ascending order.
    """
    if (
        not isinstance(layers, Sequence)
        or not layers
        or not all(type(i) is int and i >= 0 for i in layers)
        or sorted(set(layers)) != list(layers)
    ):
        raise ThriftError(f"{method} layers={layers!r} must be layers in ascending order: write layers={example}")
    return tuple(layers)
