"""AIM: merge alike visual tokens, halving their number again and again, before the language model."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.budget import Budget, share_out
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.matching import bipartite_soft_matching
from ..ops.visual import keep_all, to_keep
from .parameters import check_positions


@method(
    "aim",
    stage="connector",
    paper="AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning",
    arxiv="2412.03248",
    needs=("features", "segments", "mask", "protected"),
    status="partial",
)
class AIM:
    """Merge each visual token at an even place into the most similar one at an odd place, the most alike first.

    A round removes at most half of the tokens of a frame, crop or image; rounds go on until the budget is met. Merged
    tokens are plain means, in later rounds of what is then left, whatever was merged into it before. They stand where
    their tokens at odd places stood. Frames share the budget by their sizes, and never merge with each other.

    Partial: this is the merging before the language model, which is the authors'; their pruning inside it is not here
    (``pyramiddrop`` is a method of that kind). In a round that does not halve, they put the tokens that did not merge
    first, by falling likeness; here all stay in their order.

    Args:
        keep: tokens that are left of each image or video: a share in (0, 1], or a count.
        positions: in the language model: "gapless" as in the authors' code, or "original".

    Raises:
        ThriftError: a ``keep`` outside (0, 1] or below 1, unknown positions.
    """

    keep: int | float = 0.25
    positions: str = "gapless"

    def __post_init__(self) -> None:
        Budget.of(self.keep)
        check_positions("aim", self.positions)

    def reduce(self, view: View) -> TokenMap:
        wanted = to_keep(view, self.keep)
        if wanted is None:
            return keep_all(view)
        free, counts = wanted
        stays = view.protected & view.mask
        frames = [frame for s in view.segments for frame in s.numbers(free.device).view(s.t, -1)]
        others = torch.ones_like(free[0]).index_fill(0, torch.cat(frames), False)
        maps = []
        for row, count in enumerate(counts.tolist()):
            parts = [frame[free[row, frame]] for frame in (*frames, others.nonzero()[:, 0])]
            parts = [part for part in parts if len(part)]
            if count < len(parts):  # not one token for each of them: they merge after all
                parts = [torch.cat(parts)]
            sizes = [len(part) for part in parts]
            budgets = share_out(count, sizes, sizes, floor=1)
            merged = [_merge(view.features[row], part, k) for part, k in zip(parts, budgets, strict=True)]
            maps.append(_joined(merged, stays[row]))
        return TokenMap.stack(maps)


def _merge(features: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, TokenMap]:
    """The ``tokens`` and the map from them to ``count`` merged ones."""
    x = features[tokens][None]
    whole = TokenMap.identity(len(tokens), (1,), tokens.device)
    while x.shape[1] > count:
        groups = bipartite_soft_matching(x, min(x.shape[1] // 2, x.shape[1] - count))
        assert groups is not None  # of two tokens or more, one can always go
        round_map = groups.map()
        x, whole = round_map.apply(x), whole.then(round_map)
    return tokens, whole


def _joined(merged: list[tuple[Tensor, TokenMap]], stays: Tensor) -> TokenMap:
    """One row's map from those of its parts, outputs in the order of where they stand."""
    own = stays.nonzero()[:, 0]
    merged = [*merged, (own, TokenMap.identity(len(own), (1,), own.device))]
    anchor = torch.cat([tokens[map.anchors[0]] for tokens, map in merged])
    rank = anchor.argsort().argsort()
    target, start = [], 0
    for _, map in merged:
        target.append(rank[start + map.target[0]])
        start += map.n_out
    return TokenMap(
        source=torch.cat([tokens[map.source[0]] for tokens, map in merged])[None],
        target=torch.cat(target)[None],
        weight=torch.cat([map.weight[0] for _, map in merged])[None],
        n_in=len(stays),
        n_out=start,
        anchor=anchor.sort().values[None],
    )
