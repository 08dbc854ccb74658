"""K-Medoids: cluster the patch tokens and keep the one at the centre of each cluster."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.clustering import k_medoids, weighted_k_medoids
from ..ops.importance import attention_received
from ..ops.schedules import Removal
from ..ops.stages import Layers, check_iterations, check_stages, free_to_keep
from ..ops.unprotected import clusters_to_map, take


@method(
    "kmedoids",
    stage="vision",
    paper="Which Tokens to Use? Investigating Token Reduction in Vision Transformers",
    arxiv="2308.04657",
    needs=("features", "attention", "protected", "prefix", "tokens"),
    status="partial",
)
class KMedoids:
    """Before a few layers, cluster the patches with k-medoids that starts at the tokens with the most attention.

    The medoids stay as they are, all others go. The clustering equals the authors' code, with its own rule for the next
    medoid: see :func:`tokenthrift.ops.clustering.weighted_k_medoids`. Partial, because the weights are the attention in
    the layer that follows, computed one step ahead, and theirs that in the layer before.

    Parameters:
        keep: share of the patches that is left after the last of the layers, rounded up, in (0, 1].
        layers: where, counted from 0, e.g. ``(3, 6, 9)``, the paper's for 12 layers. None: a quarter, half and three
            quarters of the depth.
        r: instead of both, tokens to remove in every layer, as in ``tome``.
        weights: "attention", the attention that a token receives from all; or "equal", which needs no attention, starts
            at tokens that are far apart, and moves medoids as k-medoids are by the book.
        iterations: how often medoids are moved.

    Raises:
        ThriftError: what is said under Parameters does not hold.
    """

    placement: ClassVar[str] = "boundary"
    per_layer: ClassVar[str] = "r"

    keep: float = 0.343
    layers: Layers = None
    r: Removal | None = None
    weights: str = "attention"
    iterations: int = 3

    def __post_init__(self) -> None:
        check_stages(self, "kmedoids", default=KMedoids.keep)
        if self.weights not in ("attention", "equal"):
            raise ThriftError(f"kmedoids weights={self.weights!r} are unknown: write 'attention' or 'equal'")
        check_iterations("kmedoids", self.iterations, least=0, usual=3)

    def reduce(self, view: View) -> TokenMap | None:
        """The medoids, in their order."""
        todo = free_to_keep(view, "kmedoids", self.keep, self.layers, self.r)
        if todo is None:
            return None
        free, k = todo
        x = take(view.features, free)
        if self.weights == "equal":
            medoids, _ = k_medoids(x, k, iterations=self.iterations)
        else:
            weight = attention_received(view).gather(1, free)
            medoids, _ = weighted_k_medoids(x, k, weight.to(torch.float32), self.iterations)
        return clusters_to_map(view.protected, medoids)
