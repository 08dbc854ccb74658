"""SpecPC: a small model reads the prompt first, and its attention says what the large one should read."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..models.drafts import as_draft
from ..ops.draft_scores import score_of_layer, score_of_steps, smoothed


@method(
    "specpc",
    stage="prefill",
    paper="Draft-based Approximate Inference for LLMs",
    arxiv="2506.08373",
    needs=("draft", "mask"),
)
class SpecPC:
    """Keep the prompt tokens that a draft model attends to most, with their neighbours and the prompt's end.

    The draft model reads the prompt and may write a few tokens. In each of its layers the attention of the prompt's
    last queries (the later ones count more) and of the written tokens is reduced over heads and queries, then over
    layers and over tokens; the scores are smoothed along the prompt. The best tokens, their neighbours and the last
    ``window`` tokens stay, in their order. The target reads them as a shorter prompt with **new consecutive
    positions**, and generation goes on from there. The draft model writes greedily; the rows of a batch are scored
    together and chosen each on its own, where the authors' code takes one prompt at a time. Layers of the draft model
    with a sliding window do not count.

    Args:
        model: the draft model: a pack, folder or hub id, or a loaded model. It must have the target's tokenizer.
        budget: prompt tokens to keep, the window included: a count, or a ratio in (0, 1] of the prompt.
        window: the last queries, which vote and always stay. Shrinks when a ratio leaves less room than that.
        kernel: width of the smoothing.
        pool: "max", "mean" or "none".
        neighbours: how many tokens around a chosen one, itself included, are chosen with it; None = ``kernel``.
        reduction: "max" or "mean".
        first_layer: of the draft model that counts; its first layers attend to many tokens. The paper's is 8.
        lookahead: tokens that the draft model predicts; with 1 it only reads the prompt.
        weighted: the window's queries count from 0 for the first to 1 for the last.

    Raises:
        ThriftError: parameters outside these ranges; when a prompt comes: a draft model that cannot be loaded, has
            another vocabulary, or fewer layers.
    """

    model: Any
    budget: int | float = 1024
    window: int = 64
    kernel: int = 32
    pool: str = "max"
    neighbours: int | None = None
    reduction: str = "max"
    first_layer: int = 0
    lookahead: int = 1
    weighted: bool = True

    place: ClassVar[str] = "prompt"

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", as_draft("specpc", "model", self.model))
        count = Budget.of(self.budget).count
        if self.window < 1 or (count is not None and count < self.window):
            raise ThriftError(
                f"specpc needs 1 <= window <= budget, got window={self.window}, budget={self.budget}: the window stays"
            )
        if self.pool not in ("max", "mean", "none") or self.reduction not in ("max", "mean"):
            raise ThriftError("specpc knows pool='max', 'mean' and 'none', and reduction='max' and 'mean'")
        if self.kernel < 1 or self.lookahead < 1 or self.first_layer < 0 or (self.neighbours or 0) < 0:
            raise ThriftError(
                "specpc needs kernel and lookahead of at least 1, first_layer and neighbours of at least 0"
            )

    def of_layer(self, attention: Tensor) -> Tensor:
        """What one layer says: ``(batch, heads, queries, keys)`` to ``(batch, keys)``."""
        return score_of_layer(attention, self.reduction, self.weighted)

    def score(self, steps: list[list[Tensor]]) -> Tensor:
        """What all layers say at all steps, the prompt's first: ``(batch, tokens)``."""
        return score_of_steps(steps, self.reduction)

    def choose(self, scores: Tensor, capacity: int) -> Tensor:
        """The indices of at most ``capacity`` tokens, ascending, by the scores of one prompt ``(tokens,)``."""
        n, window = len(scores), min(self.window, capacity)
        scores = smoothed(scores[None], self.kernel, self.pool)[0]
        best = scores.topk(min(capacity, n)).indices if capacity < n else torch.arange(n, device=scores.device)
        near = self.kernel if self.neighbours is None else self.neighbours
        if near:
            start = -((near - 1) // 2)
            offsets = torch.arange(start, start + near, device=best.device)
            offsets = offsets[offsets.abs().argsort()]  # the nearest first: those behind may be cut off
            best = (best[:, None] + offsets).clamp(0, n - 1).flatten()
        ranked = dict.fromkeys([*range(n - window, n), *best.tolist()])
        return torch.tensor(sorted(list(ranked)[:capacity]), device=scores.device)

    def reduce(self, view: View) -> TokenMap:
        budget, lengths = Budget.of(self.budget), view.mask.sum(1).tolist()
        if all(budget.tokens(n) == n for n in lengths):
            return TokenMap.identity(view.mask.shape[1], view.mask.shape[:1], view.mask.device)
        window = min(self.window, *lengths)
        scores = self.score(view.draft(window, self.lookahead, self.first_layer, self.of_layer))
        kept = torch.zeros_like(view.mask)
        for row, n in enumerate(lengths):
            kept[row, view.mask[row].nonzero()[:, 0][self.choose(scores[row, view.mask[row]], budget.tokens(n))]] = True
        return TokenMap.keep(kept)
