"""Token Transforming: every token feeds several of the remaining ones."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.clustering import anchor_shares, ranked
from ..ops.importance import importance
from ..ops.schedules import Removal
from ..ops.stages import Layers, check_stages, free_to_keep
from ..ops.unprotected import shares_to_map, take


@method(
    "token_transforming",
    stage="vision",
    paper="Token Transforming: A Unified and Training-Free Token Compression Framework for Vision Transformer "
    "Acceleration",
    arxiv="2506.05709",
    needs=("features", "keys", "attention", "sizes", "protected", "prefix", "tokens"),
    status="partial",
)
class TokenTransforming:
    """Before a few layers, a many-to-many map: each patch hands its mass out over the anchors that are like it.

    The paper's idea is ``Y = W X`` with a dense ``W``, of which pruning and merging are special cases. Its code is not
    public, so that this construction of ``W`` is OURS, and its figures must not be read as the paper's: anchors are the
    tokens with the most attention from CLS (from all tokens, without CLS); a token's shares are the softmax over the
    anchors of cosine / temperature, with keys averaged over the heads; ``W = diag(P s)^-1 P diag(s)`` for shares ``P``
    and sizes ``s``. Sizes stay exact in total and become real numbers. A temperature towards 0 is merging with the
    nearest anchor.

    Parameters:
        keep: share of the patches that is left after the last of the layers, rounded up, in (0, 1].
        layers: where, counted from 0, e.g. ``(3, 6, 9)``. None: a quarter, half and three quarters of the depth.
        r: instead of both, tokens to remove in every layer, as in ``tome``.
        temperature: above 0.
        anchors: "attention", or "uniform": evenly spaced, so that they are not all on one object.
        hard_anchors: an anchor gives all its mass to itself.
        prop_attn: proportional attention.

    Raises:
        ThriftError: what is said under Parameters does not hold.
    """

    placement: ClassVar[str] = "boundary"
    per_layer: ClassVar[str] = "r"

    keep: float = 0.343
    layers: Layers = None
    r: Removal | None = None
    temperature: float = 0.1
    anchors: str = "attention"
    hard_anchors: bool = True
    prop_attn: bool = True

    def __post_init__(self) -> None:
        check_stages(self, "token_transforming", default=TokenTransforming.keep)
        if not 0 < self.temperature < math.inf:
            raise ThriftError(
                f"token_transforming temperature={self.temperature} must be above 0: 0.1 is the default, 0.001 merges "
                "with the nearest anchor"
            )
        if self.anchors not in ("attention", "uniform"):
            raise ThriftError(
                f"token_transforming anchors={self.anchors!r} are unknown: write 'attention' or 'uniform'"
            )

    def reduce(self, view: View) -> TokenMap | None:
        """The many-to-many map, outputs in the order of their anchors."""
        todo = free_to_keep(view, "token_transforming", self.keep, self.layers, self.r)
        if todo is None:
            return None
        free, k = todo
        if self.anchors == "uniform":
            anchors = ((2 * torch.arange(k, device=free.device) + 1) * free.shape[1] // (2 * k)).expand(len(free), -1)
        else:
            anchors = ranked(importance(view).gather(1, free))[:, :k].sort(dim=-1).values
        metric = take(view.keys.mean(1), free)
        shares = anchor_shares(metric, anchors, self.temperature, self.hard_anchors)
        return shares_to_map(view.protected, anchors, shares, view.sizes)
