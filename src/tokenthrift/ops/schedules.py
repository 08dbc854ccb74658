"""How many tokens a layer of an encoder is to remove: the parameters ``keep`` and ``r`` that its methods share."""

from __future__ import annotations

import json
import math
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.view import View

Removal = int | tuple[int, float] | list[int] | str
"""Tokens to remove: in every layer; (mean, inflect), a ramp; layer by layer; or the JSON file of such a list."""


def check_removal(name: str, keep: float, r: Removal | None, default: float) -> Removal | None:
    """Check the parameters ``keep`` and ``r`` of a method, at most one of which may be given.

    Args:
        name: what plans call the method, for the error.
        keep: share of the tokens that is left after the last layer.
        r: what :func:`parse_r` takes, or None.
        default: the default of ``keep``, by which it is known whether it was given.

    Returns:
        ``r`` as Python would write it: a ramp that came as a list, because YAML knows no tuples, is a tuple.

    Raises:
        ThriftError: ``keep`` outside (0, 1], an ``r`` that is no schedule, or both given.
    """
    check_share(name, "keep", keep, "half of the tokens")
    if r is None:
        return None
    if keep != default:
        raise ThriftError(f"{name} takes keep=... or r=..., not both")
    _numbers(r)  # says now what is wrong with it
    return (r[0], r[1]) if _is_ramp(r) else r


def check_share(name: str, parameter: str, value: float, half: str) -> None:
    """Raise ThriftError unless a parameter is a share in (0, 1]; ``half`` says in words what 0.5 keeps."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ThriftError(f"{name} {parameter}={value!r} is not a share in (0, 1]; 0.5 keeps {half}")


def to_remove(view: View, keep: float, r: Removal | None, layers: int | None = None) -> int:
    """How many tokens the layer of this view is to remove; an ``r`` that it cannot meet is warned of.

    By ``r``, or so many that the share ``keep`` of the patches (of a text: of the tokens after the prefix) is left
    after the last layer: each layer that is left takes an equal part of what is still too much, rounded up.

    Args:
        view: of the layer.
        keep, r: the parameters of the method, checked.
        layers: only the first so many layers remove tokens; None = all.
    """
    layer: int = view.layer
    acting: int = view.layers if layers is None else min(layers, view.layers)
    if layer >= acting:
        return 0
    if r is not None:
        wanted = parse_r(r, acting)[layer]
        if wanted > max(view.features.shape[1] - view.prefix, 0) // 2:  # the same words for all layers: said once
            warnings.warn(f"r={wanted} is more than half of a layer's tokens: it is clipped to half", stacklevel=3)
        return wanted
    start: int = math.prod(view.grid) if "grid" in view else view.tokens - view.prefix
    excess: int = view.features.shape[1] - view.prefix - Budget(ratio=float(keep)).tokens(start)
    return max(math.ceil(excess / (acting - layer)), 0)


def parse_r(r: Removal, layers: int) -> list[int]:
    """How many tokens each of ``layers`` layers is to remove.

    An int holds for every layer. ``(mean, inflect)``, inflect in [-1, 1], is the ramp from ``mean * (1 - inflect)`` to
    ``mean * (1 + inflect)``, rounded down. A list is padded with zeros. A string is the path of a JSON file that holds
    such a list, or ``{"r": [...]}``. Raises ThriftError for anything else, and for numbers that no layer is left
    for.
    """
    numbers = _numbers(r)
    if isinstance(numbers, int):
        return [numbers] * layers
    if isinstance(numbers, tuple):
        mean, inflect = numbers
        low = int(mean * (1 - inflect))
        step = 2 * (mean - low) / (layers - 1) if layers > 1 else 0
        return [int(low + step * layer) for layer in range(layers)]
    if any(numbers[layers:]):
        raise ThriftError(
            f"r={r!r} has numbers for {len(numbers)} layers, but only {layers} can remove tokens: shorten the list"
        )
    return (numbers + [0] * layers)[:layers]


def _numbers(r: Removal) -> int | tuple[int, float] | list[int]:
    """What a file holds, or ``r`` itself; ThriftError if it is no schedule."""
    if isinstance(r, str):
        return _from_file(r)
    if _is_ramp(r):
        return r[0], r[1]
    if _is_count(r) or _is_counts(r):
        return r
    raise ThriftError(
        f"r={r!r} is no number of tokens to remove: write r=8 (each layer), r=(8, -1.0) (a ramp) or r=[16, 8, 4]"
    )


def _from_file(path: str) -> list[int]:
    try:
        held = _read(path, Path(path).stat().st_mtime_ns)
    except (OSError, ValueError, RecursionError) as error:  # no such file; bytes that are no text, text that is no JSON
        why = error.strerror if isinstance(error, OSError) else "it holds no JSON"
        raise ThriftError(
            f"r={path!r} is no file with a schedule ({why}): write r=8, r=[16, 8, 4], or the path of a JSON list"
        ) from error
    counts = held.get("r") if isinstance(held, dict) else held
    if not _is_counts(counts):
        raise ThriftError(f'the file r={path!r} must hold one count a layer: write [16, 8, 4] or {{"r": [16, 8, 4]}}')
    return counts


@lru_cache(maxsize=64)  # every layer of every forward asks again
def _read(path: str, changed: int) -> Any:
    """What a JSON file holds that was last ``changed`` at this time."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_ramp(r: Any) -> TypeGuard[tuple[int, float]]:
    """A pair whose second is an inflection; a list of two ints is a count for each of two layers."""
    return (
        isinstance(r, tuple | list)
        and len(r) == 2
        and _is_count(r[0])
        and isinstance(r[1], int | float if isinstance(r, tuple) else float)
        and -1 <= r[1] <= 1
    )
