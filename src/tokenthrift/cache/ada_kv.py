"""AdaKV: heads that need more entries get them from heads that need fewer."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.plan import Plan
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.topk import keep_top_of_all_heads


@method(
    "ada_kv",
    stage="cache",
    paper="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
    arxiv="2407.11550",
    needs=("keys", "mask"),
)
class AdaKV:
    """Keep the best entries of all heads of a layer together, scored by another method, with a floor for each head.

    A layer keeps ``budget`` entries a head on average. The heads' caches then have different lengths, and only what is
    kept is stored.

    Args:
        budget: mean entries to keep per key/value head: a count, or a ratio in (0, 1] of the prompt.
        base: the method whose scores rank the entries, with its parameters, as in ``'snapkv(window=8)'``.
        safeguard: share of the budget that each head gets whatever its scores are.
    """

    budget: int | float = 512
    base: str = "snapkv"
    safeguard: float = 0.2

    def __post_init__(self) -> None:
        Budget.of(self.budget)
        if not 0 <= self.safeguard <= 1:
            raise ThriftError(f"ada_kv needs 0 <= safeguard <= 1, a share of each head's budget, got {self.safeguard}")
        self.scorer  # noqa: B018  # read now, so that what is wrong with it is said when the plan is read

    @cached_property
    def scorer(self) -> Any:
        """The base method, with this one's budget.

        Raises:
            ThriftError: it is no method of the cache stage that scores entries, or reduces more than once.
        """
        steps = Plan.parse(self.base).steps
        if len(steps) != 1 or steps[0].stage != "cache" or not hasattr(steps[0].method, "score"):
            raise ThriftError(
                "ada_kv needs a cache method that scores entries as its base, such as snapkv or knorm, "
                f"got '{self.base}'"
            )
        if getattr(steps[0].method, "every", 0):
            raise ThriftError(f"ada_kv reduces once: leave 'every' out of its base '{self.base}'")
        try:
            return replace(steps[0].method, budget=self.budget)
        except ThriftError as error:
            raise ThriftError(f"ada_kv gives its base its own budget, and {error}") from None

    def reduce(self, view: View) -> TokenMap:
        batch, kv_heads, n, _ = view.keys.shape
        budget = Budget.of(self.budget)
        counts = budget.tokens_of(view.mask.sum(-1))
        if bool((counts == view.mask.sum(-1)).all()):
            return TokenMap.identity(n, (batch, kv_heads), view.keys.device)
        scores = self.scorer.score(view.require(self.scorer.info.needs))
        floor = torch.floor(counts * self.safeguard).long()
        return keep_top_of_all_heads(scores, counts, floor, view.mask)
