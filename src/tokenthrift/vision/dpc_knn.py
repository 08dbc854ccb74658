"""DPC-KNN: merge patch tokens around the peaks of their density."""

from __future__ import annotations

from typing import ClassVar

from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.clustering import dpc_knn
from ..ops.schedules import Removal
from ..ops.stages import Layers, check_stages, free_to_keep
from ..ops.unprotected import clusters_to_map, take


@method(
    "dpc_knn",
    stage="vision",
    paper="Not All Tokens Are Equal: Human-centric Visual Analysis via Token Clustering Transformer",
    arxiv="2204.08680",
    needs=("features", "protected", "prefix", "tokens"),
)
class DPCKNN:
    """Before a few layers, cluster the patches by density peaks with k nearest neighbours and average each cluster.

    Needs no attention and no iterations. Equal to the code of the comparison of arXiv 2308.04657 with equal weights:
    the other setting, TCFormer's, weighs tokens by a learned score that an unmodified model does not have. Among equal
    densities the earlier token counts as the denser one (there: random noise decides).

    Parameters:
        keep: share of the patches that is left after the last of the layers, rounded up, in (0, 1].
        layers: where, counted from 0, e.g. ``(3, 6, 9)``, the comparison's for 12 layers. None: a quarter, half and
            three quarters of the depth.
        r: instead of both, tokens to remove in every layer, as in ``tome``.
        neighbours: how many tokens a density looks at, the token itself included.

    Raises:
        ThriftError: what is said under Parameters does not hold.
    """

    placement: ClassVar[str] = "boundary"
    per_layer: ClassVar[str] = "r"

    keep: float = 0.343
    layers: Layers = None
    r: Removal | None = None
    neighbours: int = 5

    def __post_init__(self) -> None:
        check_stages(self, "dpc_knn", default=DPCKNN.keep)
        if self.neighbours < 1:
            raise ThriftError(f"dpc_knn neighbours={self.neighbours} must be at least 1; 5 is the paper's number")

    def reduce(self, view: View) -> TokenMap | None:
        """The mean of each cluster, in the order of their centres."""
        todo = free_to_keep(view, "dpc_knn", self.keep, self.layers, self.r)
        if todo is None:
            return None
        free, k = todo
        centres, assign = dpc_knn(take(view.features, free), k, self.neighbours)
        return clusters_to_map(view.protected, centres, assign)
