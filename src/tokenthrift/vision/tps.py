"""TPS: prune tokens, and squeeze each pruned one into the kept one that is most like it."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.clustering import ranked
from ..ops.importance import importance
from ..ops.schedules import Removal
from ..ops.stages import Layers, check_stages, patches_to_keep
from ..ops.unprotected import take


@method(
    "tps",
    stage="vision",
    paper="Joint Token Pruning and Squeezing Towards More Aggressive Compression of Vision Transformers",
    arxiv="2304.10716",
    needs=("features", "attention", "protected", "prefix", "tokens"),
    status="partial",
)
class TPS:
    """eTPS: prune by the attention of CLS as ``evit`` does, then merge every pruned token into its nearest kept one.

    Nearest is by cosine. A kept token becomes the mean of itself, with weight e = exp(1), and of the tokens squeezed
    into it, each with weight ``exp(cosine / temperature)``; one that receives nothing does not change. Partial: this
    squeezing equals the authors' code, but that code prunes by a learned predictor (dTPS) only. What is kept, and that
    it is decided between attention and MLP, follows the paper's description of eTPS. A token that is equally near to
    several joins the first of them (the authors: all of them). CLS and other protected tokens receive nothing.

    Parameters:
        keep: share of the patches that is left after the last of the layers, rounded up, in (0, 1]; the papers' 0.7 in
            each of three layers is 0.343.
        layers: where, counted from 0, e.g. ``(3, 6, 9)``, the paper's for 12 layers. None: a quarter, half and three
            quarters of the depth.
        r: instead of both, tokens to remove in every layer, as in ``tome``.
        temperature: above 0; small ones give more weight to tokens that are much alike.

    Raises:
        ThriftError: what is said under Parameters does not hold.
    """

    per_layer: ClassVar[str] = "r"

    keep: float = 0.343
    layers: Layers = None
    r: Removal | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_stages(self, "tps", default=TPS.keep)
        if not 0 < self.temperature < math.inf:
            raise ThriftError(f"tps temperature={self.temperature} must be above 0: 1.0 is the paper's value")

    def reduce(self, view: View) -> TokenMap | None:
        """The kept tokens in their order, each with those squeezed into it."""
        x = view.features
        kept = view.prefix + patches_to_keep(view, "tps", self.keep, self.layers, self.r)
        if kept >= x.shape[1]:
            return None
        protected = view.protected
        order = ranked(importance(view).masked_fill(protected, torch.inf))
        index, pruned = (part.sort(dim=-1).values for part in (order[:, :kept], order[:, kept:]))
        y, hosts = (normalize(take(x, i).to(torch.float32), dim=-1) for i in (pruned, index))
        cosine = y @ hosts.transpose(-1, -2)
        cosine, host = cosine.masked_fill(protected.gather(1, index).unsqueeze(1), -torch.inf).max(-1)

        host = host.masked_fill(cosine.isneginf(), -1)  # all that is kept is protected
        slot = torch.arange(kept, device=x.device).expand_as(index)
        group = torch.empty_like(order).scatter_(1, index, slot).scatter_(1, pruned, host)
        # In units of e, and never so large that sums overflow.
        weight = torch.ones_like(protected, dtype=torch.float32)
        weight.scatter_(1, pruned, (cosine / self.temperature - 1).clamp(max=70).exp())
        return TokenMap.merge(group, kept, weight=weight, anchor=index)
