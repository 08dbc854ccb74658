"""DapQ: queries from where decoding will be show which entries it will read, whatever they ask."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import avg_pool1d

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.attention import attention_over, group_mean
from ..ops.topk import keep_top


@method(
    "dapq",
    stage="cache",
    paper="Where Matters More Than What: Decoding-aligned KV Cache Compression via Position-aware Pseudo Queries",
    arxiv="2603.11564",
    needs=("keys", "queries", "rotary", "scaling", "mask"),
    status="partial",
)
class DapQ:
    """Keep the entries that pseudo queries at the positions of the first tokens to come attend to most.

    Where a query stands decides more of its attention than what it asks. So the last ``queries`` queries of the prompt
    are taken before their rotation and rotated to the positions that follow the prompt; their attention is averaged,
    smoothed along the prompt, and averaged over the query heads that share a key/value head.

    Partial: there is no public code, and the paper's text was not at hand in full. Assumed are what the pseudo queries
    are made of (each layer's own queries of the prompt's end, so that no token runs through the model twice), their
    number, the pooling, and that no entry stays unless it is attended to.

    Args:
        budget: entries to keep per key/value head: a count, or a ratio in (0, 1] of the prompt.
        queries: how many pseudo queries vote; as many as there are tokens if the prompt is shorter.
        kernel: width of the pooling, odd; 1 switches it off.

    Raises:
        ThriftError: a parameter outside its range; when generating: a layer without rotary position embeddings.
    """

    budget: int | float = 512
    queries: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        Budget.of(self.budget)
        if self.queries < 1:
            raise ThriftError(f"dapq needs at least 1 pseudo query, got queries={self.queries}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ThriftError(f"dapq needs an odd kernel of at least 1, got {self.kernel}")

    def score(self, view: View) -> Tensor:
        """``(batch, kv_heads, tokens)``: attention of the pseudo queries."""
        count = min(self.queries, view.keys.shape[-2])
        content = view.rotary.last(count).undo(view.queries[:, :, -count:].float())
        real = view.mask[:, -count:]  # a short row has fewer: what stands in for them does not vote
        ahead = view.rotary.following(count, view.mask).at(real.cumsum(-1).clamp(min=1) - 1)
        rows = attention_over(ahead.apply(content), view.keys, view.scaling, view.mask)
        votes = (rows * real[:, None, :, None]).sum(-2) / real.sum(-1)[:, None, None]
        return group_mean(avg_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2), view.keys.shape[1])

    def reduce(self, view: View) -> TokenMap:
        batch, kv_heads, n, _ = view.keys.shape
        budget = Budget.of(self.budget)
        if budget.tokens(n) == n:
            return TokenMap.identity(n, (batch, kv_heads), view.keys.device)
        return keep_top(self.score(view), budget, view.mask)
