"""ToMe: merge the most similar patch tokens, a few in every layer."""

from __future__ import annotations

import math
from typing import Any, ClassVar, TypeGuard

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.matching import bipartite_soft_matching

Removal = int | tuple[int, float] | list[int]
"""Tokens to remove: in every layer; (mean, inflect), a ramp; or layer by layer."""


@method(
    "tome",
    stage="vision",
    paper="Token Merging: Your ViT But Faster",
    arxiv="2210.09461",
    needs=("features", "keys", "sizes", "protected", "prefix", "grid"),
)
class ToMe:
    """Merge similar tokens between attention and MLP, by bipartite matching of the keys; training-free.

    Merged tokens are averages weighted by size, and with ``prop_attn`` attention counts a token as often as it has
    patches. Protected tokens (CLS, registers) stay as they are. ``keep=1.0`` and ``r=0`` change nothing at all.

    Parameters:
        keep: share of the patch tokens that is left after the last layer, in (0, 1]; the layers share the work evenly.
        r: instead of ``keep``, tokens to remove: ``8`` in every layer; ``(8, -1.0)`` on a linear ramp around 8 (-1.0
            falls to 0, 1.0 rises from it); ``[16, 8]`` layer by layer, none after the last one named.
            No layer can merge more than half of its unprotected tokens; larger numbers are clipped.
        prop_attn: proportional attention. The paper turns it off for models pre-trained with MAE.

    Raises:
        ThriftError: ``keep`` outside (0, 1], a negative ``r``, or both given.
    """

    per_layer: ClassVar[str] = "r"

    keep: float = 0.5
    r: Removal | None = None
    prop_attn: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float) or not 0 < self.keep <= 1:
            raise ThriftError(f"tome keep={self.keep!r} is not a share in (0, 1]; 0.5 keeps half of the patch tokens")
        if self.r is not None:
            if self.keep != type(self).keep:
                raise ThriftError("tome takes keep=... or r=..., not both")
            parse_r(self.r, 1)  # says now what is wrong with it
            if _is_ramp(self.r):  # YAML knows no tuples
                object.__setattr__(self, "r", tuple(self.r))

    def reduce(self, view: View) -> TokenMap | None:
        """The merge of this layer; None where no token is to go."""
        r = self._to_remove(view)
        if r <= 0:
            return None
        groups = bipartite_soft_matching(view.keys.mean(1), r, view.protected)
        return None if groups is None else groups.map(view.sizes)

    def _to_remove(self, view: View) -> int:
        if self.r is not None:
            layer: int = view.layer
            return parse_r(self.r, view.layers)[layer]
        patches: int = view.features.shape[1] - view.prefix
        excess = patches - Budget(ratio=float(self.keep)).tokens(math.prod(view.grid))
        layers_left: int = view.layers - view.layer
        return math.ceil(excess / layers_left)  # an equal part for each layer left, rounded up


def parse_r(r: Removal, layers: int) -> list[int]:
    """How many tokens each of ``layers`` layers is to remove.

    An int holds for every layer. ``(mean, inflect)``, inflect in [-1, 1], is the ramp from ``mean * (1 - inflect)`` to
    ``mean * (1 + inflect)``, rounded down. A list is padded with zeros. Raises ThriftError for anything else.
    """
    if _is_count(r):
        return [r] * layers
    if _is_ramp(r):
        mean, inflect = r
        low = int(mean * (1 - inflect))
        step = 2 * (mean - low) / (layers - 1) if layers > 1 else 0
        return [int(low + step * layer) for layer in range(layers)]
    if isinstance(r, list) and all(map(_is_count, r)):
        return (r + [0] * layers)[:layers]
    raise ThriftError(
        f"r={r!r} is no number of tokens to remove: write r=8 (each layer), r=(8, -1.0) (a ramp) or r=[16, 8, 4]"
    )


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_ramp(r: Any) -> TypeGuard[tuple[int, float]]:
    """A pair whose second is an inflection; a list of two ints is a count for each of two layers."""
    return (
        isinstance(r, tuple | list)
        and len(r) == 2
        and _is_count(r[0])
        and isinstance(r[1], int | float if isinstance(r, tuple) else float)
        and -1 <= r[1] <= 1
    )
