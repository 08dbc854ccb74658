"""GemFilter: the first layers know what the last prompt token looks for; the model then reads only that."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.topk import keep_top


@method(
    "gemfilter",
    stage="prefill",
    paper="Discovering the Gems in Early Layers: Accelerating Long-Context LLMs with 1000x Input Token Reduction",
    arxiv="2409.17422",
    needs=("queries", "keys", "mask"),
)
class GemFilter:
    """Run the first layers on the prompt, keep the tokens that its last query matches best, and read only these.

    Scores are the products of the last query and all keys of one layer, summed over the heads and smoothed along the
    prompt by average pooling. The kept tokens, in their order, are a new and shorter prompt: the whole model runs on
    them from the start, with **new consecutive positions**, and generation goes on from there.

    Args:
        budget: prompt tokens to keep: a count, or a ratio in (0, 1] of the prompt.
        layer: whose queries and keys decide, counted from 0; None = at 13/32 of the depth, the paper's for Llama 3.1.
        kernel: width of the pooling, odd; 1 switches it off.
        last: the prompt's last token always stays: a prompt that ends elsewhere may be answered by its own end. False
            leaves it to the scores, as the authors' code does.

    Raises:
        ThriftError: a budget that keeps nothing, an even kernel, a layer that the model does not have.
    """

    budget: int | float = 1024
    layer: int | None = None
    kernel: int = 5
    last: bool = True

    place: ClassVar[str] = "prompt"

    def __post_init__(self) -> None:
        Budget.of(self.budget)
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ThriftError(f"gemfilter needs an odd kernel of at least 1, got {self.kernel}")
        if self.layer is not None and self.layer < 0:
            raise ThriftError(f"gemfilter layer={self.layer} is no layer: they are counted from 0")

    def scoring_layer(self, layers: int) -> int:
        """The layer that decides, of a model with ``layers`` layers."""
        layer = layers * 13 // 32 if self.layer is None else self.layer
        if layer >= layers:
            raise ThriftError(f"gemfilter layer={layer}: the model has {layers} layers; name one of 0 to {layers - 1}")
        return layer

    def score(self, view: View) -> Tensor:
        """``(batch, tokens)``: summed over the heads, then pooled."""
        last, keys = (t.to(torch.float32) for t in (view.queries[:, :, -1:], view.keys))
        batch, kv_heads, _, dim = keys.shape
        products = last.reshape(batch, kv_heads, -1, dim) @ keys.transpose(-1, -2)
        total = products.sum((1, 2)).masked_fill(~view.mask, 0)  # padding lends its neighbours nothing
        return avg_pool1d(total.unsqueeze(1), self.kernel, stride=1, padding=self.kernel // 2).squeeze(1)

    def reduce(self, view: View) -> TokenMap:
        budget, n = Budget.of(self.budget), view.mask.shape[-1]
        if budget.tokens(n) == n:
            return TokenMap.identity(n, view.mask.shape[:1], view.mask.device)
        score = self.score(view)
        if self.last:
            score[:, -1] = torch.inf
        return TokenMap.keep(keep_top(score.unsqueeze(1), budget, view.mask).kept.squeeze(1))
