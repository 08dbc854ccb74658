"""ToFu: prune similar tokens in the first layers, merge them in the later ones without shrinking their norm."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.matching import bipartite_soft_matching
from ..ops.schedules import Removal, check_removal, to_remove


@method(
    "tofu",
    stage="vision",
    paper="Token Fusion: Bridging the Gap between Token Pruning and Token Merging",
    arxiv="2312.01026",
    needs=("features", "keys", "sizes", "protected", "prefix", "grid"),
    status="partial",
)
class ToFu:
    """Bipartite matching of the keys as in ``tome``; early layers drop the matched tokens, later ones merge them.

    Averages are shorter than what they average, and layers that respond to tokens in a non-linear way suffer from
    averages at all. So the first layers prune: of two matched tokens one goes, the other stays as it is. The later ones
    merge by MLERP: the direction is that of the mean, the norm is the largest of the group's.

    The authors published no code. Assumed are the number of layers that prune (the paper measures how linear each layer
    of a model is), that the mean is weighted by size as in ToMe, and that pruned tokens do not count in the sizes.

    Parameters:
        keep: share of the patch tokens that is left after the last layer, in (0, 1]; the layers share the work evenly.
        r: instead of ``keep``, tokens to remove, as for ``tome``: ``8``, ``(8, -1.0)``, ``[16, 8]`` or a file.
        prune: share of the layers, from the first, that prune; 0 merges in all layers, 1 in none.
        prop_attn: proportional attention, as in ToMe.

    Raises:
        ThriftError: ``keep`` outside (0, 1], a negative ``r``, or both given; ``prune`` outside [0, 1].
    """

    per_layer: ClassVar[str] = "r"

    keep: float = 0.5
    r: Removal | None = None
    prune: float = 0.5
    prop_attn: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", check_removal("tofu", self.keep, self.r, type(self).keep))
        if not 0 <= self.prune <= 1:
            raise ThriftError(f"tofu prune={self.prune!r} is no share of the layers: write 0.5, or 0.0 for none")

    def reduce(self, view: View) -> TokenMap | None:
        """The selection or the merge of this layer; None where no token is to go."""
        r = to_remove(view, self.keep, self.r)
        if r <= 0:
            return None
        groups = bipartite_soft_matching(view.keys.mean(1), r, view.protected)
        if groups is None:
            return None
        if view.layer < math.ceil(view.layers * self.prune):
            return TokenMap.select(groups.anchor, groups.group.shape[-1])
        return groups.map(view.sizes)

    def combine(self, view: View, map: TokenMap) -> Tensor:
        """The features of what is left."""
        return map.apply(view.features) if map.is_selection else mlerp(view.features, map)


def mlerp(x: Tensor, map: TokenMap) -> Tensor:
    """``m / ‖m‖ · max ‖x_i‖`` for every group with the mean ``m``; a token on its own is left as it is, to the bit.

    Args:
        x: ``(batch, tokens, dim)``.
        map: a merge of ``(batch,)`` rows that drops no token.

    Returns:
        ``(batch, n_out, dim)`` in ``x``'s dtype; zero where the tokens of a group cancel out.
    """
    mean, norms = map.apply(x), torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    longest = norms.new_zeros(*map.lead, map.n_out).scatter_reduce_(-1, map.owner, norms, "amax")
    scaled = normalize(mean.to(torch.float32), dim=-1) * longest.unsqueeze(-1)
    return torch.where((map.sizes() > 1).unsqueeze(-1), scaled.to(x.dtype), mean)
