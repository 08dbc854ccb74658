"""Methods that reduce tokens in a few layers: where, and how many. The parameters ``keep``, ``layers`` and ``r``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..core.errors import ThriftError
from ..core.view import View
from .schedules import Removal, check_removal, parse_r
from .unprotected import split_protected

Layers = tuple[int, ...] | None
"""Layers in ascending order, counted from 0; None = at a quarter, half and three quarters of the depth."""

MOST_ITERATIONS = 1000
"""No clustering needs as many."""


def check_stages(method: Any, name: str, default: float) -> None:
    """Check the parameters ``keep``, ``layers`` and ``r`` of a method, and make the lists that YAML gave tuples.

    Raises:
        ThriftError: ``keep`` outside (0, 1], ``layers`` that are none, an ``r`` that is no schedule, or ``r`` and one
            of the others.
    """
    object.__setattr__(method, "r", check_removal(name, method.keep, method.r, default))
    if method.layers is None:
        return
    object.__setattr__(method, "layers", _check_layers(name, method.layers))
    if method.r is not None:
        raise ThriftError(f"{name} takes layers=... or r=..., not both: r has a number for each layer")


def _check_layers(name: str, layers: Any) -> tuple[int, ...]:
    if (
        not isinstance(layers, Sequence)
        or isinstance(layers, str)
        or not layers
        or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in layers)
        or sorted(set(layers)) != list(layers)
    ):
        raise ThriftError(
            f"{name} layers={layers!r} must be layers in ascending order, from 0 on: write layers=(3, 6, 9)"
        )
    return tuple(layers)


def patches_to_keep(view: View, name: str, keep: float, layers: Layers, r: Removal | None) -> int:
    """How many of this layer's tokens after the prefix are to stay; all of them in layers that are not named.

    ``keep`` is the share of the tokens at the start that is left after the last of the layers, as everywhere in this
    stage. Each of ``n`` layers keeps the share ``keep ** (1 / n)`` of what it gets; papers name that one: 0.7 in each
    of three layers is ``keep=0.343``.

    Args:
        view: of the layer.
        name, keep, layers, r: the method and its parameters, checked.

    Raises:
        ThriftError: the model has fewer layers than are named.
    """
    patches: int = view.features.shape[1] - view.prefix
    layer: int = view.layer
    if r is not None:
        wanted = patches - parse_r(r, view.layers)[layer]
        if wanted < 1:  # the same words for all layers: said once
            warnings.warn(f"r={patches - wanted} is all that a layer has: it is clipped, one is left", stacklevel=3)
    else:
        stages = stages_of(view.layers, name, layers)
        if keep == 1 or layer not in stages:
            return patches
        start: int = view.tokens - view.prefix
        share = keep ** ((stages.index(layer) + 1) / len(stages))
        wanted = math.ceil(start * share - 1e-9)  # rounded up, but not for a last digit of the power
    return min(max(wanted, 1), patches)


def free_to_keep(view: View, name: str, keep: float, layers: Layers, r: Removal | None) -> tuple[Tensor, int] | None:
    """For methods that cluster: the unprotected tokens ``(batch, free)``, and of them how many are to be left.

    None where no token is to go; then nothing is computed.
    """
    kept = view.prefix + patches_to_keep(view, name, keep, layers, r)
    if kept >= view.features.shape[1]:
        return None
    free, held = split_protected(view.protected)
    k = max(kept - held.shape[1], 1)
    return None if k >= free.shape[1] else (free, k)


def stages_of(depth: int, name: str, layers: Layers) -> tuple[int, ...]:
    """The layers that reduce tokens in a model with ``depth`` layers."""
    if layers is None:
        return tuple(sorted({depth * part // 4 for part in (1, 2, 3)}))
    if layers[-1] >= depth:
        raise ThriftError(f"{name} layers={layers}: the model has {depth} layers; name some of 0 to {depth - 1}")
    return layers


def check_iterations(name: str, iterations: int, least: int, usual: int) -> None:
    """Raise ThriftError unless a number of iterations is one that ends; ``usual`` is the paper's."""
    if not least <= iterations <= MOST_ITERATIONS:
        raise ThriftError(
            f"{name} iterations={iterations} must be at least {least} and at most {MOST_ITERATIONS}; "
            f"{usual} is the paper's number"
        )
