"""TCA-Attention: heads get what they were found to need, and blocks of the text what they are worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..models.calibration import Calibration, calibration_for
from ..models.head_budgets import score_budgets
from ..ops.attention import group_mean
from ..ops.core_tokens import core_scores
from ..ops.head_budgets import budgets_for_mass, budgets_for_mean
from ..ops.rows import score_rows

_NAME = "tca_attention"


@method(
    _NAME,
    stage="cache",
    paper="Training-free Context-adaptive Attention for Efficient Long Context Modeling",
    arxiv="2512.09238",
    needs=("keys", "attention", "mask", "layer"),
    status="partial",
)
class TCAAttention:
    """Keep the core tokens of every block: heads have budgets found once per model, blocks keep 1, 2, 4, … tokens.

    Once per model, one forward over a text measures how much of what a head attends to later is among the tokens that
    it would keep, for every budget. All heads then get the budget at which they hold the same share of their attention.
    Online, the text between the first tokens and the last ``window`` is cut into blocks. A block keeps fewer tokens the
    more redundant it is: the shares of blocks that keep 1, 2, 4, …, ``block`` are a Gaussian of the logarithm.

    Partial: there is no public code, and of the paper only the abstract and a summary were at hand. From these are the
    candidates for a head's budget (the log-Gaussian shares), that it is found offline in one forward, and that
    redundancy decides online. Assumed are the measure offline (attention kept, and one ``spread`` for all), that a
    block's redundancy is how little attention it gets from the last ``window`` queries, which rank its tokens too, and
    that first and last tokens stay.
    Left out: prefill stays dense, and later tokens are kept, where the paper has both read core tokens only.

    Args:
        budget: entries to keep, mean over all heads of all layers: a count, or a ratio in (0, 1] of the prompt.
        mass: in place of a budget: each head keeps what held this share of its attention on the calibration text.
        block: tokens in a block, a power of two.
        window: how many of the last queries look for core tokens; their own entries stay.
        sinks: how many of the first tokens stay.
        spread: how unequally blocks keep tokens: standard deviation of the logarithm to base 2.
        heads: a file that ``tokenthrift calibrate tca_attention`` wrote; "auto" takes what comes with this library, for
            smollm2-135m; "even" gives every head the same; or the figures, ``[layer][key/value head][step]``: the
            attention that a head holds with none, ``1 / steps``, … and all of the tokens.

    Raises:
        ThriftError: a parameter outside its range, a file that is no calibration; when it is applied: a calibration of
            another model, none for this one, or figures for other heads.
    """

    budget: int | float = 512
    mass: float | None = None
    block: int = 16
    window: int = 32
    sinks: int = 4
    spread: float = 1.0
    heads: Any = "auto"

    def __post_init__(self) -> None:
        count = Budget.of(self.budget).count
        small = self.mass is None and count is not None and count <= self.sinks + self.window
        if self.sinks < 0 or self.window < 1 or small:
            raise ThriftError(
                f"{_NAME} needs sinks >= 0, window >= 1 and a budget above both together, got sinks={self.sinks}, "
                f"window={self.window}, budget={self.budget}"
            )
        if self.block < 2 or self.block & (self.block - 1):
            raise ThriftError(f"{_NAME} needs a block of 2, 4, 8, … tokens, got {self.block}")
        if not 0.1 <= self.spread <= 100:
            raise ThriftError(f"{_NAME} needs a spread in [0.1, 100], got {self.spread}")
        if self.mass is not None and (not 0 < self.mass <= 1 or self.heads == "even"):
            raise ThriftError(f"{_NAME} needs a mass in (0, 1], and figures of heads for it, got mass={self.mass}")
        if not isinstance(self.heads, str):
            object.__setattr__(self, "heads", _figures(self.heads))
        elif self.heads not in ("auto", "even"):
            Calibration.load(self.heads, _NAME)  # whether there is such a file, while the plan is read

    def bind(self, model: Any) -> TCAAttention:
        """Itself, with the figures of this model."""
        if not isinstance(self.heads, str) or self.heads == "even":
            return self
        found = calibration_for(_NAME, model, None if self.heads == "auto" else self.heads)
        return replace(self, heads=found.data["held"])

    @staticmethod
    def calibrate(
        model: Any, *, tokens: int = 1024, queries: int = 128, steps: int = 32, block: int = 16, window: int = 32,
        sinks: int = 4, spread: float = 1.0, seed: int = 0, progress: Callable[[int, int], None] | None = None,
    ) -> Calibration:  # fmt: skip
        """Measure the model's heads; see :func:`tokenthrift.models.head_budgets.score_budgets`."""
        online = {"block": block, "window": window, "sinks": sinks, "spread": spread}
        text = {"tokens": tokens, "queries": queries, "steps": steps, "seed": seed}
        score = TCAAttention.info.make(budget=1.0, heads="even", **online).score  # type: ignore[attr-defined]
        held = score_budgets(model, score, tokens=tokens, queries=queries, steps=steps, seed=seed, progress=progress)
        rounded = [[[round(x, 4) for x in head] for head in layer] for layer in held]
        return Calibration.of(_NAME, model, {**text, **online, "held": rounded})

    def score(self, view: View) -> Tensor:
        """``(batch, kv_heads, tokens)``: what a head with room for ``n`` keeps are its ``n`` highest."""
        rows = view.attention(min(self.window, view.keys.shape[-2])).sum(-2)
        return score_rows(self._row_scores, view.mask, group_mean(rows, view.keys.shape[1]).unsqueeze(-1))

    def _row_scores(self, votes: Tensor) -> Tensor:
        votes = votes.squeeze(-1)
        n = votes.shape[-1]
        out = torch.arange(1, n + 1, device=votes.device, dtype=torch.float32).expand(votes.shape).clone()
        out[..., : self.sinks] = float("inf")
        blocks = max(n - self.sinks - self.window, 0) // self.block  # what fills no block belongs to the window
        if blocks:
            middle = slice(self.sinks, self.sinks + blocks * self.block)
            worth = votes[..., middle].unflatten(-1, (blocks, self.block))
            out[..., middle] = core_scores(worth, -worth.sum(-1), self.spread).flatten(-2)
        return out

    def reduce(self, view: View) -> TokenMap:
        counts = self._counts(view)
        if bool((counts == view.mask.sum(-1, keepdim=True)).all()):  # nothing to drop: no bit changes
            return TokenMap.identity(view.mask.shape[-1], counts.shape, counts.device)
        score = self.score(view).masked_fill(~view.mask.unsqueeze(1), float("-inf"))
        place = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return TokenMap.keep(place < counts.unsqueeze(-1))

    def _counts(self, view: View) -> Tensor:
        """``(batch, kv_heads)``: how many of the real tokens of a row each head of this layer keeps."""
        lengths, kv_heads = view.mask.sum(-1).tolist(), view.keys.shape[1]
        if self.heads == "even":
            counts = [[Budget.of(self.budget).tokens(n)] * kv_heads for n in lengths]
        elif isinstance(self.heads, str):
            raise ThriftError(f"{_NAME} must know the heads: apply it to a model, or give heads='even'")
        elif view.layer >= len(self.heads) or len(self.heads[view.layer]) != kv_heads:
            raise ThriftError(f"the figures given to {_NAME} do not fit layer {view.layer} of {kv_heads} heads")
        else:
            first = sum(map(len, self.heads[: view.layer]))
            counts = [self._of_model(n)[first : first + kv_heads] for n in lengths]
        return torch.tensor(counts, device=view.mask.device)

    def _of_model(self, n: int) -> list[int]:
        """How many of ``n`` tokens each head of the model keeps."""
        held, floor = tuple(head for layer in self.heads for head in layer), self.sinks + self.window
        if self.mass is not None:
            return budgets_for_mass(held, n, self.mass, floor)
        return budgets_for_mean(held, n, Budget.of(self.budget).tokens(n), floor)


def _figures(value: Any) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """As tuples, which can be looked up. Raises ThriftError for what is no figures."""
    try:
        held = tuple(tuple(tuple(map(float, head)) for head in layer) for layer in value)
        heads = [head for layer in held for head in layer]
        steps = {len(head) for head in heads}
        rising = all(0 <= a <= b <= 1 for head in heads for a, b in pairwise(head))
        if len(steps) == 1 and min(steps) > 1 and rising and all(head[-1] == 1 for head in heads):
            return held
    except (TypeError, ValueError):
        pass
    raise ThriftError(
        f"{_NAME} needs heads as a file, 'auto', 'even', or for every layer and key/value head as many numbers, rising "
        "to 1, such as [[[0.5, 0.9, 1], [0.2, 0.6, 1]]]"
    )
