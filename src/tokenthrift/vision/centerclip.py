"""CenterCLIP: cluster the patches of a few video frames, and keep the centres."""

from __future__ import annotations

from typing import ClassVar

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.clustering import Metric, k_medoids
from ..ops.unprotected import clusters_to_map, split_protected, take


@method(
    "centerclip",
    stage="vision",
    paper="CenterCLIP: Token Clustering for Efficient Text-Video Retrieval",
    arxiv="2205.00823",
    needs=("features", "protected", "prefix", "layer", "layers"),
)
class CenterCLIP:
    """Before one layer, join the frames of a segment and keep the medoids of all their patches (k-medoids++).

    From there on a segment is one sequence: CLS (the mean over its frames), then the medoids in their order in space
    and time. The batch must hold the frames of a video one after the other, a multiple of ``frames``; the encoder then
    returns one row a segment. Deterministic. The authors' stopping rule looks at the whole batch; here each row stops
    when no medoid of it moves. Their other way of clustering (spectral) is not here.

    Parameters:
        at: the layer, counted from 0, in front of which it happens. The paper's is 6 of 12.
        frames: frames in a segment; 1 = single images.
        centers: tokens that a segment keeps besides CLS: a count, or a share of its patches. The paper has 49 for
            patches of 32 pixels, and 100 or 160 for those of 16.
        distance: "euclidean" or "cosine".
        pre_norm: divide patches by their norm before they are compared.
        mean: every centre becomes the mean of its cluster; False keeps the medoid itself and drops the others.

    Raises:
        ThriftError: what is said under Parameters does not hold, or the model has no layer ``at``.
    """

    placement: ClassVar[str] = "boundary"

    at: int = 6
    frames: int = 1
    centers: int | float = 49
    distance: str = "euclidean"
    pre_norm: bool = False
    mean: bool = False

    def __post_init__(self) -> None:
        Budget.of(self.centers)
        if self.at < 0 or self.frames < 1:
            raise ThriftError(
                f"centerclip at={self.at}, frames={self.frames}: layers count from 0, and segments have 1 frame or more"
            )
        if self.distance not in ("euclidean", "cosine"):
            raise ThriftError(
                f"centerclip distance={self.distance!r} is unknown: write distance='euclidean' or distance='cosine'"
            )

    def join(self, layer: int) -> int:
        """The frames of a segment become one sequence."""
        return self.frames if layer == self.at else 1

    def reduce(self, view: View) -> TokenMap | None:
        """The mean CLS and the centres, in one layer."""
        if self.at >= view.layers:
            raise ThriftError(
                f"centerclip at={self.at}: the model has {view.layers} layers; write at=0 to at={view.layers - 1}"
            )
        if view.layer != self.at:
            return None
        free, _ = split_protected(view.protected)
        k = Budget.of(self.centers).tokens(free.shape[1])
        if self.frames == 1 and k == free.shape[1]:
            return None
        metric: Metric = "cosine" if self.distance == "cosine" else "euclidean"
        medoids, assign = k_medoids(take(view.features, free), k, metric, pre_norm=self.pre_norm)
        return clusters_to_map(view.protected, medoids, assign if self.mean else None, self.frames)
