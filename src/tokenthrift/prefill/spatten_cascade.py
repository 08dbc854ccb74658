"""SpAtten's cascade: tokens and heads that got or gave little so far are computed by no later layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.topk import keep_top
from .layers import ascending

TOKENS = ((1, 1 / 7), (2, 2 / 7), (4, 4 / 7), (10, 1.0))
"""After which layer of 24, counted from 0, which part of the way to ``keep`` is gone: 90, 80, 60 and 30% of GPT-2
medium's tokens are left in the workload that the authors publish with their hardware."""
HEADS = ((15, 0.5), (21, 1.0))
"""The same for its heads: of 16, 13 and 10 are left."""


@method(
    "spatten_cascade",
    stage="prefill",
    paper="SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning",
    arxiv="2012.09852",
    needs=("importance", "lengths", "mask", "protected"),
    status="partial",
)
class SpAttenCascade:
    """After some layers, drop for good the prompt tokens that received least attention so far.

    Attention probabilities are summed over all heads and queries and over all layers so far; what goes is neither
    computed nor stored by any later layer. Heads can go in the same way, by the absolute size of their outputs so far:
    a head of that number is computed in no later layer, for the prompt and for all that follows. Every later token can
    read fewer values: in each head those of the entries with the highest probabilities. All tokens keep their true
    positions; the last token of the prompt stays, and so do all tokens after it.

    Partial: the authors publish no code of the cascade. The default layers and shares are those of the workload that
    comes with their hardware, for GPT-2 medium, scaled to the depth of the model. Assumed: the prompt is reduced while
    it is read, as the paper does for BERT, and what is dropped there stays dropped; in the workload for GPT-2, the
    first layers read the whole cache for each new token. Of the dropped heads, only attention is not computed: queries,
    keys and values still are. The progressive quantization of keys is **simulated**: it changes the result and counts
    how often all bits were needed, and saves nothing. Logits of dropped prompt tokens are read off where they stopped.
    The sums of attention cost as much as the attention of the layers up to the last one that drops tokens; under a
    causal mask they favour early tokens, so that a small ``keep`` can lose the question at the end of a prompt.

    Args:
        keep: share of the prompt's tokens that is left in the end, in (0, 1].
        heads: share of the heads that is left in the end, in (0, 1]. The workload's is 0.625.
        values: share of the values that each head reads for a later token, in (0, 1]. The workload's is 0.3.
        threshold: later tokens read 8 bits of the keys, and the 4 others where no probability reaches this; None
            switches it off. The authors' configuration has 0.05.
        layers: after which tokens are dropped, counted from 0, ascending, in equal steps; None = those of the workload.

    Raises:
        ThriftError: shares outside (0, 1], a threshold outside [0, 1], layers that are none or not there, a model with
            sliding windows; a plan with a cache, attention or decode stage.
    """

    keep: float = 0.3
    heads: float = 1.0
    values: float = 1.0
    threshold: float | None = None
    layers: Any = None

    place: ClassVar[str] = "cascade"

    def __post_init__(self) -> None:
        for share in (self.keep, self.heads, self.values):
            Budget(ratio=share)
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ThriftError(
                f"spatten_cascade threshold={self.threshold} is no probability: 0.05 is usual, None is off"
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", ascending("spatten_cascade", self.layers, "(2, 5, 12)"))

    @property
    def own_attention(self) -> bool:
        """Whether attention is computed otherwise than the model does."""
        return self.heads < 1 or self.values < 1 or self.threshold is not None

    def token_shares(self, layers: int) -> dict[int, float]:
        """Of a model with ``layers`` layers: after which ones tokens are dropped, and the share of the prompt that is
        then left."""
        if self.layers is None:
            return _scaled(TOKENS, self.keep, layers)
        if self.layers[-1] >= layers - 1:
            raise ThriftError(
                f"spatten_cascade layers={self.layers}: name some of 0 to {layers - 2}, below the last layer"
            )
        steps = len(self.layers)
        shares = {end: 1 - (1 - self.keep) * (i + 1) / steps for i, end in enumerate(self.layers)}
        return shares if self.keep < 1 else {}

    def head_shares(self, layers: int) -> dict[int, float]:
        """The same for heads."""
        return _scaled(HEADS, self.heads, layers)

    def reduce(self, view: View) -> TokenMap:
        counts = Budget(ratio=self.token_shares(view.layers)[view.layer]).tokens_of(view.lengths)
        counts = torch.maximum(counts, (view.protected & view.mask).sum(1))
        score = view.importance.masked_fill(view.protected, torch.inf)
        return TokenMap.keep(keep_top(score.unsqueeze(1), counts, view.mask).kept.squeeze(1))

    def choose_heads(self, magnitude: Tensor, layer: int, layers: int) -> Tensor:
        """The heads of each row that later layers compute, ascending.

        Args:
            magnitude: ``(batch, heads)``, the sum of the absolute outputs so far.
            layer: that has just run, one of :meth:`head_shares`.
            layers: of the model.
        """
        count = Budget(ratio=self.head_shares(layers)[layer]).tokens(magnitude.shape[1])
        return magnitude.topk(count, dim=1).indices.sort(dim=1).values


def _scaled(steps: Sequence[tuple[int, float]], share: float, layers: int) -> dict[int, float]:
    """Of ``steps`` in 24 layers, those in so many, below the last layer; of steps that meet, the last."""
    if share == 1 or layers < 2:
        return {}
    ends = [min(round(layers * at / 24), layers - 2) for at, _ in steps]
    return {end: 1 - (1 - share) * part for end, (_, part) in zip(ends, steps, strict=True)}
