"""MCTF: merge tokens that are alike, uninformative and small, and reuse the attention that said so."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.fusion import multi_criteria_matching
from ..ops.importance import attention_received
from ..ops.schedules import Removal, check_removal, to_remove

FEWEST = 10
"""Tokens that are never merged further, prefix included; the authors' number."""
SMALL = 512
"""Tokens whose attention is held as a whole, so that it need not be computed twice; of more it would be too large."""
POOLINGS = ("size", "attention", "max", "mean")
"""The authors' pooling types 0 to 3, in this order."""


@method(
    "mctf",
    stage="vision",
    paper="Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers",
    arxiv="2403.10030",
    needs=("features", "attention", "sizes", "protected", "prefix", "grid"),
)
class MCTF:
    """Merge before attention by similarity, attention received and size, in both directions; training-free.

    In every layer but the first, the attention of all tokens is computed one step ahead. Pairs score high that are
    alike, little attended to and small (``ops/fusion.py`` has the formula). With ``one_step_ahead`` the fused tokens
    then use that same attention, its columns summed and its rows averaged over each group, instead of new queries and
    keys. The map of up to 512 tokens is held in between; of more, it is computed in blocks, and again by the layer.

    ``keep=1.0`` and ``r=0`` change nothing; never are fewer than 10 tokens left (in the authors' code a share may leave
    fewer). The authors fine-tune for 30 epochs with a consistency loss; what is here is their inference.

    Parameters:
        keep: share of the patch tokens that is left after the last layer, in (0, 1]; all layers but the first share
            the work evenly.
        r: instead of ``keep``, tokens to remove: ``16`` (the paper's) in every layer but the first; ``0.1`` a share,
            below 1, of the layer's tokens; ``(8, -1.0)`` a ramp; ``[0, 16, 8]`` layer by layer, the first is not used.
        tau_sim, tau_info, tau_size: temperatures of the three criteria; the larger, the less a criterion says, and 0
            turns it off.
        bidirectional: merge half from even to odd positions, then half back.
        pooling: a merged token is the mean weighted by ``"size"`` (the paper), by ``"attention"`` received times size,
            the plain ``"mean"``, or the ``"max"`` of every feature. With ``"max"`` the fused attention still averages
            its rows (the authors take the maximum there too, after which rows no longer sum to one).
        one_step_ahead: False computes the attention of the fused tokens anew.
        prop_attn: proportional attention, also in the attention one step ahead.

    Raises:
        ThriftError: ``keep`` or ``r`` out of range, or both given; a negative temperature; an unknown pooling.
    """

    placement: ClassVar[Literal["between", "boundary", "around"]] = "boundary"
    per_layer: ClassVar[str] = "r"

    keep: float = 0.5
    r: Removal | float | None = None
    tau_sim: float = 1.0
    tau_info: float = 20.0
    tau_size: float = 40.0
    bidirectional: bool = True
    pooling: str = "size"
    one_step_ahead: bool = True
    prop_attn: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.r, float):
            if not 0 <= self.r < 1:
                raise ThriftError(f"mctf r={self.r!r}: a share is below 1 (r=0.1), a number of tokens an int (r=16)")
            check_removal("mctf", self.keep, 0, type(self).keep)
        else:
            object.__setattr__(self, "r", check_removal("mctf", self.keep, self.r, type(self).keep))
        for name in ("tau_sim", "tau_info", "tau_size"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ThriftError(f"mctf {name}={getattr(self, name)!r}: write a number above 0, or 0 to turn it off")
        if self.pooling not in POOLINGS:
            raise ThriftError(f"mctf pooling={self.pooling!r}: write one of {', '.join(map(repr, POOLINGS))}")

    @property
    def fused_attention(self) -> bool:
        """Whether the layer uses the attention of before the merge, fused."""
        return self.one_step_ahead

    def reduce(self, view: View) -> TokenMap | None:
        """The merge before this layer's attention; None where no token is to go."""
        r = self._to_remove(view)
        if r <= 0:
            return None
        reads_attention = self.tau_info or self.pooling == "attention"
        received = attention_received(view, SMALL) / view.features.shape[1] if reads_attention else None
        groups = multi_criteria_matching(
            view.features,
            r,
            received=received,
            sizes=view.sizes,
            protected=view.protected,
            tau_sim=self.tau_sim,
            tau_info=self.tau_info,
            tau_size=self.tau_size,
            bidirectional=self.bidirectional,
        )
        if groups is None:
            return None
        if received is not None and self.pooling == "attention":
            return groups.map(received * view.sizes)
        return groups.map(None if self.pooling == "mean" else view.sizes)

    def combine(self, view: View, map: TokenMap) -> Tensor:
        """The merged features ``(batch, n_out, dim)``: the map's averages, or the maxima of its groups."""
        if self.pooling != "max":
            return map.apply(view.features)
        x: Tensor = view.features
        slot = map.owner.unsqueeze(-1).expand_as(x)
        lowest = x.new_full((x.shape[0], map.n_out, x.shape[2]), -torch.inf)
        return lowest.scatter_reduce(1, slot, x, "amax")

    def _to_remove(self, view: View) -> int:
        if view.layer == 0:
            return 0
        tokens: int = view.features.shape[1]
        if isinstance(self.r, float):
            r = int((tokens - view.prefix) * self.r)
        else:
            r = to_remove(view, self.keep, self.r)
        return min(r, tokens - FEWEST)
