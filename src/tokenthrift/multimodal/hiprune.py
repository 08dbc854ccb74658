"""HiPrune: an early layer finds the object, a deep one the rest; needs no CLS."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.topk import top_mask
from ..ops.visual import keep_all, keep_chosen, neighbours, to_keep
from .parameters import check_positions, check_share, encoder_layer


@method(
    "hiprune",
    stage="connector",
    paper="HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
    arxiv="2508.00553",
    needs=("received", "segments", "layers", "mask", "protected"),
)
class HiPrune:
    """Keep what an early layer attends to, with its surroundings, and fill up with what a deep layer attends to.

    Scores are the attention that a token receives from all tokens of the encoder, mean over heads. The best tokens of
    the object layer (*anchors*) stay with their four neighbours in the grid (*buffers*); the best of the deep layer
    that are left (*registers*) fill the budget. The tokens of an image are one set, with all its crops; the authors
    give each crop the same budget.

    Args:
        keep: tokens to keep of each image: a share in (0, 1], or a count.
        alpha: share of the budget for anchors and buffers: a fifth of it, rounded, are anchors.
        object_layer: of the anchors, counted from 0, or negative from the end; None: at 3/8 of the depth, which is the
            authors' for LLaVA (the ninth of 24; for Qwen2.5-VL they take the sixteenth of 32).
        deep_layer: of the registers; the authors' for LLaVA is the last but one, for Qwen2.5-VL the last one (-1).
        official: neighbours are those in the order of the tokens, as in the authors' code, so that the end of a line
            has the start of the next one beside it.
        positions: in the language model: "gapless" as in the authors' LLaVA, or "original" as in their Qwen2.5-VL.

    Raises:
        ThriftError: a ``keep`` outside (0, 1] or below 1, ``alpha`` outside [0, 1], layers that the
            encoder does not have, unknown positions.
    """

    keep: int | float = 0.111
    alpha: float = 0.1
    object_layer: int | None = None
    deep_layer: int = -2
    official: bool = False
    positions: str = "gapless"

    def __post_init__(self) -> None:
        Budget.of(self.keep)
        check_share("hiprune", "alpha", self.alpha)
        check_positions("hiprune", self.positions)

    def encoder_layers(self, count: int) -> tuple[int, int]:
        """The object layer and the deep one, of an encoder with ``count`` layers."""
        middle = max(round(count * 3 / 8) - 1, 0) if self.object_layer is None else self.object_layer
        return (
            encoder_layer("hiprune", "object_layer", middle, count),
            encoder_layer("hiprune", "deep_layer", self.deep_layer, count),
        )

    def reduce(self, view: View) -> TokenMap:
        wanted = to_keep(view, self.keep)
        if wanted is None:
            return keep_all(view)
        free, counts = wanted
        middle, deep = self.encoder_layers(view.layers)
        anchors = torch.tensor([min(round(k * self.alpha / 5), k // 5) for k in counts.tolist()], device=counts.device)
        first = self._with_neighbours(top_mask(view.received(middle), anchors, free), view) & free
        score = view.received(deep).masked_fill(first, torch.inf)
        return keep_chosen(view, top_mask(score, counts, free))

    def _with_neighbours(self, anchors: Tensor, view: View) -> Tensor:
        """``(batch, tokens)`` bool: anchors and buffers."""
        taken = anchors.clone()
        for segment in view.segments:
            tokens = segment.numbers(anchors.device)
            beside = neighbours(segment, self.official, anchors.device)
            taken[:, tokens] |= taken.new_zeros(len(taken), len(tokens)).scatter_reduce(
                1, beside.flatten().expand(len(taken), -1), anchors[:, tokens].repeat_interleave(4, dim=1), "amax"
            )
        return taken
