"""AdaKV: heads that need more entries get them from heads that need fewer."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.errors import ThriftError, check_choice
from ..core.method import method
from ..core.plan import Plan
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.topk import best_of_all_heads, best_of_each_head, keep_top_of_all_heads
from .repeated import check_every


@method(
    "ada_kv",
    stage="cache",
    paper="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
    arxiv="2407.11550",
    needs=("keys", "mask", "again"),
)
class AdaKV:
    """Keep the best entries of all heads of a layer together, scored by another method, with a floor for each head.

    A layer keeps ``budget`` entries a head on average. The heads' caches then have different lengths, and only what is
    kept is stored. Reduced again, each head's entries are scored by themselves, then pooled as before.

    The safeguard is a floor, as in kvpress, or a share that is dealt out evenly, as in the paper: with ``"mix"`` a head
    keeps ``(1 - safeguard)`` times as many as it has among the best of all heads, and ``safeguard`` times the budget;
    the base's window is beside that, and numbers are rounded as in the authors' code, so the sum may miss the budget by
    an entry a head.

    Args:
        budget: mean entries to keep per key/value head: a count, or a ratio in (0, 1] of the prompt.
        base: the method whose scores rank the entries, with its parameters, as in ``'snapkv(window=8)'``.
        safeguard: share of the budget that each head gets whatever its scores are.
        every: reduce again whenever so many tokens have come since; 0 reduces once, after the first forward. The base
            must be able to do that too.
        safe: what the safeguard is, ``"floor"`` or ``"mix"``.
        concentration: weigh the scores of each head by the part of their sum that its best ``budget`` entries have, as
            the authors' code does; for a base that scores by attention, such as snapkv.
    """

    budget: int | float = 512
    base: str = "snapkv"
    safeguard: float = 0.2
    every: int = 0
    safe: str = "floor"
    concentration: bool = False

    def __post_init__(self) -> None:
        Budget.of(self.budget)
        if not 0 <= self.safeguard <= 1:
            raise ThriftError(f"ada_kv needs 0 <= safeguard <= 1, a share of each head's budget, got {self.safeguard}")
        check_every("ada_kv", self.every, self.budget)
        check_choice("ada_kv", "safe", self.safe, ("floor", "mix"))
        self.scorer  # noqa: B018  # read now, so that what is wrong with it is said when the plan is read

    @cached_property
    def scorer(self) -> Any:
        """The base method, with this one's budget.

        Raises:
            ThriftError: it is no method of the cache stage that scores entries, it has an ``every`` of its own, or it
                cannot be asked again.
        """
        steps = Plan.parse(self.base).steps
        if len(steps) != 1 or steps[0].stage != "cache" or not hasattr(steps[0].method, "score"):
            raise ThriftError(
                "ada_kv needs a cache method that scores entries as its base, such as snapkv or knorm, "
                f"got '{self.base}'"
            )
        if getattr(steps[0].method, "every", 0):
            raise ThriftError(f"ada_kv has its own 'every': leave it out of its base '{self.base}'")
        if getattr(steps[0].method, "merge", "none") != "none":
            raise ThriftError(f"ada_kv evicts what it does not keep: leave 'merge' out of its base '{self.base}'")
        if self.every and "every" not in steps[0].method.info.defaults:
            raise ThriftError(
                f"ada_kv(every={self.every}) needs a base that can be reduced again, such as snapkv, knorm or h2o, got "
                f"'{self.base}'"
            )
        try:
            return replace(steps[0].method, budget=self.budget)
        except ThriftError as error:
            raise ThriftError(f"ada_kv gives its base its own budget, and {error}") from None

    @property
    def reads(self) -> tuple[str, ...]:
        """What the base method reads of a view."""
        needs: tuple[str, ...] = self.scorer.info.needs
        return needs

    @property
    def lookback(self) -> int:
        """How many of the last queries the base method reads when the cache is reduced again."""
        return int(getattr(self.scorer, "lookback", 0))

    def reduce(self, view: View) -> TokenMap:
        batch, kv_heads, n, _ = view.keys.shape
        asked = view.by_head if view.again else view
        held = view.by_head.mask.view(batch, kv_heads, n) if view.again else view.mask[:, None].expand(-1, kv_heads, -1)
        lengths = held.sum((1, 2)) // kv_heads  # heads differ, their mean is whole: tokens come to all of them
        counts = Budget.of(self.budget).tokens_of(lengths)
        if bool((counts == lengths).all()):
            return TokenMap.identity(n, (batch, kv_heads), view.keys.device)
        scores = self.scorer.score(asked.require(self.scorer.info.needs)).view(batch, kv_heads, n)
        window = int(getattr(self.scorer, "window", 0))
        older = (counts - window).clamp(min=0)  # of these the budget decides
        pooled = self._weighed(scores, older, window) if self.concentration else scores
        if self.safe == "floor":
            floor = torch.floor(counts * self.safeguard).long()
            return keep_top_of_all_heads(pooled, counts, floor, held)
        scores, pooled = (s.masked_fill(~held, float("-inf")) for s in (scores, pooled))
        among = best_of_all_heads(pooled, counts).sum(-1) - window
        even = torch.floor(older * self.safeguard)[:, None]
        share = torch.round(among * (1 - self.safeguard) + even).long() + window
        share = torch.where((counts == lengths)[:, None], n, share)  # a short row keeps all
        return TokenMap.keep(best_of_each_head(scores, share) & held)

    @staticmethod
    def _weighed(scores: Tensor, counts: Tensor, window: int) -> Tensor:
        """The scores before the window, times the part of their sum that the best ``counts`` ``(batch,)`` have."""
        older, newest = scores.split([scores.shape[-1] - window, window], dim=-1)
        best = (older * best_of_each_head(older, counts[:, None])).sum(-1, keepdim=True)
        total = older.sum(-1, keepdim=True).clamp(min=torch.finfo(older.dtype).tiny)
        return torch.cat([older * (best / total), newest], dim=-1)
