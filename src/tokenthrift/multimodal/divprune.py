"""DivPrune: keep the visual tokens that are most unlike each other."""

from __future__ import annotations

from ..core.budget import Budget
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.diversity import max_min_diversity
from ..ops.visual import keep_all, keep_chosen, to_keep
from .parameters import check_positions


@method(
    "divprune",
    stage="connector",
    paper="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
    arxiv="2503.02175",
    needs=("features", "mask", "protected"),
)
class DivPrune:
    """Keep the visual tokens that are farthest apart, whatever the question is; needs no CLS token.

    Distances are cosine distances of the projected tokens. The first token is the one whose nearest other one is
    farthest; then always the token comes that is farthest from those chosen so far (greedy max-min diversity). The
    tokens of an image, crops and all, are one set, as in the authors' code; so are the frames of a video.

    Args:
        keep: tokens to keep of each image: a share in (0, 1], or a count.
        positions: in the language model: "gapless" as in the authors' code, or "original".

    Raises:
        ThriftError: a ``keep`` outside (0, 1] or below 1, unknown positions.
    """

    keep: int | float = 0.098
    positions: str = "gapless"

    def __post_init__(self) -> None:
        Budget.of(self.keep)
        check_positions("divprune", self.positions)

    def reduce(self, view: View) -> TokenMap:
        wanted = to_keep(view, self.keep)
        if wanted is None:
            return keep_all(view)
        free, counts = wanted
        order = max_min_diversity(view.features, counts, free)
        chosen = free.new_zeros(free.shape).scatter_reduce(1, order.clamp(min=0), order >= 0, "amax")
        return keep_chosen(view, chosen)
