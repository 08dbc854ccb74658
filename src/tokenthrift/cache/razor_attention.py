"""RazorAttention: few heads look things up far back; the others need little, and a summary of the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..models.calibration import Calibration, calibration_for, identity
from ..models.retrieval_heads import score_heads
from .repeated import check_every

_NAME = "razor_attention"


@method(
    _NAME,
    stage="cache",
    paper="RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
    arxiv="2407.15891",
    needs=("keys", "mask", "again", "layer"),
    status="partial",
)
class RazorAttention:
    """Keep everything in retrieval heads; in the others the first tokens, the newest, and one entry for all between.

    That entry, the compensation token, has the mean key and the mean value of what was dropped, and counts in attention
    as often as there were tokens. Which heads look back is measured once per model: on a repeated block of random
    tokens, the best ``induction`` of all key/value heads by attention to what followed earlier occurrences of a token,
    and the best ``echo`` by attention to these themselves. A key/value head is judged by the best of its query heads.

    Partial: there is no code of the paper's to compare with; the search follows that of the authors' company (MindSpore
    Golden Stick). With ``every=1`` the window goes on moving while decoding, as in the paper: what leaves it joins the
    compensation token. Retrieval heads then go on growing.

    Args:
        budget: entries to keep in a head that is no retrieval head, first tokens and compensation token included: a
            count, or a ratio in (0, 1] of the prompt.
        least: keep at least so many where the budget is a ratio.
        sinks: how many of them are the first tokens.
        induction: share of all heads that are retrieval heads by induction.
        echo: share of all heads that are retrieval heads by echo.
        heads: a file that ``tokenthrift calibrate razor_attention`` wrote; "auto" takes what comes with this library,
            for smollm2-135m; or the retrieval heads themselves, as pairs ``[layer, key/value head]``.
        every: reduce again whenever so many tokens have come since; 0 reduces once, after the first forward.
            Needs a budget that is a count.

    Raises:
        ThriftError: a parameter outside its range, a file that is no calibration; when it is applied: a calibration of
            another model, none for this one, or heads that it does not have.
    """

    budget: int | float = 0.2
    least: int = 4000
    sinks: int = 4
    induction: float = 0.14
    echo: float = 0.01
    heads: Any = "auto"
    every: int = 0

    proportional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        count = Budget.of(self.budget).count
        if self.sinks < 0 or (count is not None and count < self.sinks + 2):
            raise ThriftError(
                f"{_NAME} needs sinks of at least 0 and room for 2 entries more in its budget, got "
                f"sinks={self.sinks}, budget={self.budget}"
            )
        if self.least < 0:
            raise ThriftError(f"{_NAME} needs least of at least 0, got {self.least}")
        if not (0 <= self.induction <= 1 and 0 <= self.echo <= 1):
            raise ThriftError(f"{_NAME} needs shares in [0, 1], got induction={self.induction}, echo={self.echo}")
        check_every(_NAME, self.every, self.budget)
        if isinstance(self.heads, list | tuple):
            if not all(isinstance(p, list | tuple) and len(p) == 2 and all(map(_is_index, p)) for p in self.heads):
                raise ThriftError(f"{_NAME} needs heads as pairs such as [[0, 1], [3, 2]], got {self.heads!r}")
        elif not isinstance(self.heads, str):
            raise ThriftError(f"{_NAME} needs heads as a file, 'auto' or a list of pairs, got {self.heads!r}")
        elif self.heads != "auto":
            Calibration.load(self.heads, _NAME)  # whether there is such a file, while the plan is read

    def bind(self, model: Any) -> RazorAttention:
        """Itself, with the heads of this model."""
        if isinstance(self.heads, str):
            found = calibration_for(_NAME, model, None if self.heads == "auto" else self.heads).data
            best = _best(found["induction"], self.induction) + _best(found["echo"], self.echo)
            return replace(self, heads=sorted(set(best)))
        shape = identity(model)
        for layer, head in self.heads:
            if layer >= shape["layers"] or head >= shape["kv_heads"]:
                raise ThriftError(
                    f"{_NAME} was given head {head} of layer {layer}: this model has {shape['layers']} layers of "
                    f"{shape['kv_heads']} key/value heads, counted from 0"
                )
        return self

    @staticmethod
    def calibrate(
        model: Any, *, block: int | None = None, repeats: int = 4, seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Calibration:  # fmt: skip
        """Score the model's heads; see :func:`tokenthrift.models.retrieval_heads.score_heads`."""
        echo, induction, block = score_heads(model, block=block, repeats=repeats, seed=seed, progress=progress)
        echo, induction = ([[round(x, 6) for x in row] for row in scores] for scores in (echo, induction))
        data = {"block": block, "repeats": repeats, "seed": seed, "echo": echo, "induction": induction}
        return Calibration.of(_NAME, model, data)

    def reduce(self, view: View) -> TokenMap:
        if isinstance(self.heads, str):
            raise ThriftError(f"{_NAME} must know the heads: apply it to a model, or give heads=[[layer, head], …]")
        batch, kv_heads, n, _ = view.keys.shape
        held = view.by_head.mask.view(batch, kv_heads, n) if view.again else view.mask[:, None].expand(-1, kv_heads, -1)
        budget, lengths = Budget.of(self.budget), held.sum(-1)
        keep = budget.tokens_of(lengths).to(lengths.device)
        if budget.count is None:
            keep = keep.clamp(min=self.least)
        retrieval = torch.tensor([(view.layer, h) in map(tuple, self.heads) for h in range(kv_heads)])
        if bool((lengths <= keep).all()) or bool(retrieval.all()):
            return TokenMap.identity(n, (batch, kv_heads), view.keys.device)
        # What is dropped joins the entry behind the sinks: reduced again, that is the compensation token.
        dropped = torch.where(lengths > keep, lengths - keep + 1, 1)[..., None]  # a single one stands for itself
        sinks = (keep.clamp(max=self.sinks + 1) - 1)[..., None]
        order = held.cumsum(-1) - 1  # of the real entries
        local = torch.where(order < sinks, order, (order - dropped + 1).maximum(sinks))
        group = torch.where(retrieval.to(order.device)[:, None], order, local)
        return TokenMap.merge(group.masked_fill(~held, -1), weight=view.sizes if view.again else None)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _best(scores: list[list[float]], share: float) -> list[tuple[int, int]]:
    """``(layer, head)`` of the share of all heads that score highest."""
    heads = [(layer, head) for layer, row in enumerate(scores) for head in range(len(row))]
    return sorted(heads, key=lambda pair: -scores[pair[0]][pair[1]])[: round(len(heads) * share)]
