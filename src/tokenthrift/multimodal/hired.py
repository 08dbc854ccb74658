"""HiRED: CLS of the whole image shares the budget among its crops, and CLS of each crop spends it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.budget import Budget, share_out
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.topk import top_mask
from ..ops.visual import keep_all, keep_chosen, to_keep
from .parameters import check_positions, check_share, encoder_layer


@method(
    "hired",
    stage="connector",
    paper="HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models",
    arxiv="2408.10945",
    needs=("cls", "segments", "mask", "protected"),
)
class HiRED:
    """Keep the tokens that CLS attends to, with a budget for each crop by what an early layer finds in its area.

    A part of the budget is the whole image's. The rest goes to the crops in proportion to how many of the tokens that
    CLS of the whole image attends to most, in an early layer, lie on the area of each. Within the whole image and each
    crop the tokens with the most attention from CLS in a late layer stay, summed over the heads. Layouts without crops
    are ranked by the late layer alone, all tokens in one set, as the authors do with LLaVA-1.5.

    Args:
        keep: tokens to keep of each image: a share in (0, 1], or a count.
        alpha: the whole image's part of the budget; ``1 - alpha`` of its tokens say where the crops' part goes.
        early_layer: that shares out the budget, counted from 0, or negative from the end.
        late_layer: that ranks tokens.
        official: the authors' arithmetic: areas are runs of tokens in raster order, not rectangles, and fractions of
            tokens are lost, so that fewer are left than ``keep`` says.
        positions: in the language model: "gapless" as in the authors' code, or "original".

    Raises:
        ThriftError: a ``keep`` outside (0, 1] or below 1, ``alpha`` outside [0, 1], layers that the
            encoder does not have, unknown positions; an encoder without CLS, for which there are
            ``hiprune`` and ``divprune``.
    """

    keep: int | float = 0.2
    alpha: float = 0.5
    early_layer: int = 0
    late_layer: int = -2
    official: bool = False
    positions: str = "gapless"

    def __post_init__(self) -> None:
        Budget.of(self.keep)
        check_share("hired", "alpha", self.alpha)
        check_positions("hired", self.positions)

    def encoder_layers(self, count: int) -> tuple[int, int]:
        """The early layer and the late one, of an encoder with ``count`` layers."""
        return (
            encoder_layer("hired", "early_layer", self.early_layer, count),
            encoder_layer("hired", "late_layer", self.late_layer, count),
        )

    def reduce(self, view: View) -> TokenMap:
        wanted = to_keep(view, self.keep)
        if wanted is None:
            return keep_all(view)
        free, counts = wanted
        score = view.cls(self.late_layer).sum(1)
        wholes = [s for s in view.segments if s.kind == "image"]
        crops = sorted((s for s in view.segments if s.kind == "crop"), key=lambda s: (s.row, s.col))
        if len(wholes) != 1 or not crops:
            return keep_chosen(view, top_mask(score, counts, free))
        chosen = torch.zeros_like(free)
        parts = [s.numbers(free.device) for s in (wholes[0], *crops)]
        budgets = self._budgets(view, wholes[0], crops, parts, free, counts)
        for part, budget in zip(parts, budgets.unbind(1), strict=True):
            chosen[:, part] = top_mask(score[:, part], budget, free[:, part])
        return keep_chosen(view, chosen)

    def _budgets(
        self, view: View, whole: Any, crops: list[Any], parts: list[Tensor], free: Tensor, counts: Tensor
    ) -> Tensor:
        """How many tokens the whole image and each crop keep: ``(batch, 1 + crops)`` int64."""
        seen = free[:, parts[0]]
        top = torch.full_like(counts, int(len(parts[0]) * (1 - self.alpha)))
        looked_at = top_mask(view.cls(self.early_layer)[:, :, parts[0]].sum(1), top, seen)
        area = _run_of(whole, crops) if self.official else _area_of(whole, crops)
        caps = [free[:, part].sum(1).tolist() for part in parts]
        budgets = []
        for row, total in enumerate(counts.tolist()):
            room = [cap[row] for cap in caps]
            weights = torch.bincount(area[looked_at[row].cpu()], minlength=len(crops))
            if self.official:
                total = int(sum(room) * self.keep) if isinstance(self.keep, float) else total
                first = min(max(int(total * self.alpha), 1), room[0])
                shares = weights / weights.sum().clamp(min=1) * min(total - first, sum(room[1:]))
                rest = [min(int(share), cap) for share, cap in zip(shares, room[1:], strict=True)]
            else:
                first = min(max(int(total * self.alpha), total - sum(room[1:])), room[0])
                rest = share_out(total - first, weights.tolist(), room[1:])
            budgets.append([first, *rest])
        return torch.tensor(budgets, device=counts.device)


def _area_of(whole: Any, crops: list[Any]) -> Tensor:
    """Of each token of the whole image the crop on which its middle lies: ``(t * h * w,)`` int64."""
    number = {(s.row, s.col): i for i, s in enumerate(crops)}
    heights, widths = {s.row: s.h for s in crops}, {s.col: s.w for s in crops}
    rows, columns = _split(whole.h, heights), _split(whole.w, widths)
    grid = [[number.get((row, column), 0) for column in columns] for row in rows]
    return torch.tensor(grid).flatten().repeat(whole.t)


def _split(length: int, sizes: dict[int, int]) -> list[int]:
    """Of each of ``length`` places in a line which of the crops, whose ``sizes`` lie side by side, its middle is on."""
    order = sorted(sizes)
    ends = torch.tensor([sizes[i] for i in order]).cumsum(0)
    middles = (torch.arange(length) + 0.5) * int(ends[-1]) / length
    return [order[int(i)] for i in torch.bucketize(middles, ends, right=True)]


def _run_of(whole: Any, crops: list[Any]) -> Tensor:
    """The same as the authors have it: equal runs of tokens in raster order."""
    n = whole.t * whole.h * whole.w
    return torch.arange(n) * len(crops) // n
