"""Sinkhorn: spread the patch tokens over a few centres by optimal transport."""

from __future__ import annotations

import math
from typing import ClassVar

from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.clustering import k_medoids, sinkhorn_shares
from ..ops.schedules import Removal
from ..ops.stages import Layers, check_iterations, check_stages, free_to_keep
from ..ops.unprotected import shares_to_map, take

CENTRE_ITERATIONS = 10
"""Of the clustering that makes the centres: they need not be its optimum."""


@method(
    "sinkhorn",
    stage="vision",
    paper="Which Tokens to Use? Investigating Token Reduction in Vision Transformers",
    arxiv="2308.04657",
    needs=("features", "sizes", "protected", "prefix", "tokens"),
    status="partial",
)
class Sinkhorn:
    """Before a few layers, hand the mass of every patch out over the centres such that all get about the same.

    The transport equals the authors' code. Partial, because their centres are learned with the model: here they are the
    medoids (cosine) of the tokens at hand. New tokens are averages of the tokens as they are, weighted by what each
    handed out and by its size; the authors sum tokens of norm 1, for which an unmodified model was not trained.

    Parameters:
        keep: share of the patches that is left after the last of the layers, rounded up, in (0, 1].
        layers: where, counted from 0, e.g. ``(3, 6, 9)``, the paper's for 12 layers. None: a quarter, half and three
            quarters of the depth.
        r: instead of both, tokens to remove in every layer, as in ``tome``.
        eps: strength of the entropy, above 0. The authors learn with 1.0, which averages nearly everything; small
            values keep tokens apart.
        iterations: Sinkhorn iterations, at least 1.

    Raises:
        ThriftError: what is said under Parameters does not hold.
    """

    placement: ClassVar[str] = "boundary"
    per_layer: ClassVar[str] = "r"

    keep: float = 0.343
    layers: Layers = None
    r: Removal | None = None
    eps: float = 0.05
    iterations: int = 3

    def __post_init__(self) -> None:
        check_stages(self, "sinkhorn", default=Sinkhorn.keep)
        if not 0 < self.eps < math.inf:
            raise ThriftError(f"sinkhorn eps={self.eps} is no strength: write an eps above 0, 0.05 is the default")
        check_iterations("sinkhorn", self.iterations, least=1, usual=3)

    def reduce(self, view: View) -> TokenMap | None:
        """The many-to-many map of the transport, outputs in the order of their centres."""
        todo = free_to_keep(view, "sinkhorn", self.keep, self.layers, self.r)
        if todo is None:
            return None
        free, k = todo
        x = take(view.features, free)
        centres, _ = k_medoids(x, k, "cosine", iterations=CENTRE_ITERATIONS)
        shares = sinkhorn_shares(x, take(x, centres), self.eps, self.iterations)
        return shares_to_map(view.protected, centres, shares, view.sizes)
