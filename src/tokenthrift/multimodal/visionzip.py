"""VisionZip: keep what CLS attends to, merge the rest into a few contextual tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.topk import top_mask
from ..ops.visual import keep_all, to_keep
from .parameters import check_positions, encoder_layer


@method(
    "visionzip",
    stage="connector",
    paper="VisionZip: Longer is Better but Not Necessary in Vision Language Models",
    arxiv="2412.04467",
    needs=("cls", "keys", "mask", "protected"),
    status="partial",
)
class VisionZip:
    """Keep the tokens with the most attention from CLS, and merge all others into a few by the likeness of their keys.

    Of the tokens that are left over, evenly spaced ones are targets. Each other one joins the target with the most
    similar key (mean over heads). A contextual token is target and others in equal parts, the others as their mean; it
    stands where its target stood.

    Partial: the choice of tokens, targets and groups is the authors'. They add a target and the mean of its others
    before the projector, where here the projected tokens are averaged, and so keep the length of a token; they put the
    merged tokens last; and they pass the CLS token on too, which is no token of the image here. They reduce every crop
    by itself, here the tokens of an image are one set.

    Args:
        keep: tokens that are left of each image, merged ones included: a share in (0, 1], or a count.
        contextual: how many of these are merged ones: a share in [0, 1), or a count.
        layer: of the encoder, whose CLS and keys are read, counted from 0, or negative from the end.
        positions: in the language model: "gapless" as in the authors' code, or "original".

    Raises:
        ThriftError: a ``keep`` outside (0, 1] or below 1, contextual tokens outside their range or as many as ``keep``,
            a layer that the encoder does not have, unknown positions; an encoder without CLS, for which there are
            ``hiprune`` and ``divprune``.
    """

    keep: int | float = 0.111
    contextual: int | float = 10 / 64
    layer: int = -2
    positions: str = "gapless"

    def __post_init__(self) -> None:
        Budget.of(self.keep)
        check_positions("visionzip", self.positions)
        most = 1 if isinstance(self.contextual, float) else self.keep if isinstance(self.keep, int) else torch.inf
        if not 0 <= self.contextual < most:
            raise ThriftError(
                f"visionzip contextual={self.contextual} must be a share in [0, 1), or a count below keep={self.keep}"
            )

    def encoder_layers(self, count: int) -> tuple[int]:
        """The layer that is read, of an encoder with ``count``."""
        return (encoder_layer("visionzip", "layer", self.layer, count),)

    def reduce(self, view: View) -> TokenMap:
        wanted = to_keep(view, self.keep)
        if wanted is None:
            return keep_all(view)
        free, counts = wanted
        if isinstance(self.contextual, int):
            merged = (counts - 1).clamp(max=self.contextual)
        else:
            merged = (counts * self.contextual + 0.5).long().clamp(max=(counts - 1))
        dominant = top_mask(view.cls(self.layer).sum(1), counts - merged, free)
        kept, rest = dominant | (view.protected & view.mask), free & ~dominant
        keys = normalize(view.keys(self.layer).mean(1).to(torch.float32), dim=-1)
        rows = zip(keys, kept, rest, merged.tolist(), strict=True)
        return TokenMap.stack([_zip(*row) for row in rows])


def _zip(keys: Tensor, kept: Tensor, rest: Tensor, count: int) -> TokenMap:
    """One row's map, from ``(tokens, dim)`` keys, the tokens that stay and those that are merged into ``count``."""
    left, stay = rest.nonzero()[:, 0], kept.nonzero()[:, 0]
    group = torch.full(kept.shape, -1, device=keys.device)
    group[stay] = torch.arange(len(stay), device=keys.device)
    mass, anchor = torch.ones(kept.shape, device=keys.device), stay
    if count:
        target = torch.arange(0, len(left), max(1, len(left) // count), device=keys.device)[:count]
        others = torch.ones_like(left, dtype=torch.bool).index_fill(0, target, False)
        target, others = left[target], left[others]
        joined = (keys[others] @ keys[target].T).argmax(-1)
        group[target] = len(stay) + torch.arange(count, device=keys.device)
        group[others] = len(stay) + joined
        # Half of a merged token is its target, half the mean of the others.
        mass[target] = torch.bincount(joined, minlength=count).clamp(min=1).to(mass.dtype)
        anchor = torch.cat([stay, target])
    anchor, order = anchor.sort()
    group = torch.where(group < 0, -1, order.argsort()[group])
    return TokenMap.merge(group[None], len(anchor), weight=mass[None], anchor=anchor[None])
