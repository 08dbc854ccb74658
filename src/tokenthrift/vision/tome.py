"""ToMe: merge the most similar patch tokens, a few in every layer."""

from __future__ import annotations

from typing import ClassVar, get_args

from ..core.errors import ThriftError, did_you_mean
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.matching import Order, bipartite_soft_matching
from ..ops.schedules import Removal, check_removal, to_remove


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
            falls to 0, 1.0 rises from it); ``[16, 8]`` layer by layer, none after the last one named;
            ``"schedule.json"``, a file with such a list. No layer can merge more than half of its unprotected tokens;
            larger numbers are clipped.
        prop_attn: proportional attention. The paper turns it off for models pre-trained with MAE.
        order: of the tokens that are left. ``position`` keeps theirs. ``official`` is that of the authors' code:
            protected tokens, then those left at even positions, then those at odd ones. It decides which tokens the
            next layer can compare, so it is what repeats the authors' outputs over several layers.

    Raises:
        ThriftError: ``keep`` outside (0, 1], a negative ``r``, or both given; another ``order``.
    """

    per_layer: ClassVar[str] = "r"

    keep: float = 0.5
    r: Removal | None = None
    prop_attn: bool = True
    order: Order = "position"

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", check_removal("tome", self.keep, self.r, type(self).keep))
        if self.order not in get_args(Order):
            raise ThriftError(f"tome has no order={self.order!r}: {did_you_mean(str(self.order), get_args(Order))}")

    def reduce(self, view: View) -> TokenMap | None:
        """The merge of this layer; None where no token is to go."""
        r = to_remove(view, self.keep, self.r)
        if r <= 0:
            return None
        groups = bipartite_soft_matching(view.keys.mean(1), r, view.protected, self.order)
        return None if groups is None else groups.map(view.sizes)
