"""Token Sparse Attention: each head leaves out the tokens that hardly anyone looks at, anew in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.topk import keep_top


@method(
    "token_sparse_attention",
    stage="prefill",
    paper="Token Sparse Attention: Efficient Long-Context Inference with Interleaved Token Selection",
    arxiv="2602.03216",
    needs=("attention", "mask"),
)
class TokenSparseAttention:
    """In some layers, let each head attend among a part of the prompt; its other tokens get nothing from that head.

    Tokens are scored by the attention of the prompt's last queries, averaged over these and smoothed along the prompt.
    How many go is one number a layer: as many of the weakest, by the mean of the heads, as hold a share ``coverage``
    of the attention. Which go is each head's own choice. Queries, keys and values of the others attend as usual, and
    the outputs return to their places: a token that is left out passes by the residual, and the next layer chooses
    anew. Nothing is evicted: the cache and all positions are those of the whole prompt.

    Args:
        coverage: share of the attention that may be lost, in [0, 1); 0 leaves out nothing.
        min_tokens: tokens before the window that a head keeps at least; shorter prompts run as they are.
        window: the last queries, which vote and always stay.
        kernel: width of the pooling, odd; 1 switches it off.
        layers: that act, counted from 0; None = the second half. The paper takes the layers that change the hidden
            states least: 15 to 30 of the 32 of Llama 3.1 8B. Layers with a sliding window are left alone.

    Raises:
        ThriftError: parameters outside these ranges, or a layer that the model does not have.
    """

    coverage: float = 0.005
    min_tokens: int = 1024
    window: int = 128
    kernel: int = 7
    layers: Any = None

    place: ClassVar[str] = "heads"

    def __post_init__(self) -> None:
        if not 0 <= self.coverage < 1:
            raise ThriftError(f"token_sparse_attention coverage={self.coverage} is outside [0, 1); 0.005 is usual")
        if min(self.min_tokens, self.window) < 1:
            raise ThriftError("token_sparse_attention needs min_tokens and window of at least 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ThriftError(f"token_sparse_attention needs an odd kernel of at least 1, got {self.kernel}")
        if self.layers is not None:
            named = [self.layers] if isinstance(self.layers, int) else self.layers
            if not isinstance(named, Sequence) or isinstance(named, str) or not all(type(i) is int for i in named):
                raise ThriftError(f"token_sparse_attention layers={self.layers!r}: name layers, layers=(15, 16, 17)")
            object.__setattr__(self, "layers", tuple(named))

    def sparse_layers(self, layers: int) -> list[int]:
        """The layers that act, of a model with ``layers`` layers."""
        wrong = [i for i in self.layers or () if not 0 <= i < layers]
        if wrong:
            raise ThriftError(
                f"token_sparse_attention layers={self.layers}: the model has {layers} layers; name some of 0 to "
                f"{layers - 1}"
            )
        return list(range(layers // 2, layers)) if self.layers is None else sorted(set(self.layers))

    def kept(self, scores: Tensor, lengths: Tensor) -> Tensor:
        """How many tokens each head keeps, ``(batch,)``, by the scores of the tokens before the window."""
        before = lengths - self.window
        mean = scores.mean(1)
        share = (mean / (mean.sum(-1, keepdim=True) + 1e-8)).sort(-1).values.cumsum(-1)
        # Padding has no score, and comes first.
        weak = (share < self.coverage).sum(-1) - (scores.shape[-1] - before)
        left = torch.maximum(before - weak - 1, torch.full_like(before, self.min_tokens)) + self.window
        return torch.where((weak <= 0) | (before <= self.min_tokens), lengths, left)

    def reduce(self, view: View) -> TokenMap:
        n, lengths = view.mask.shape[-1], view.mask.sum(-1)
        if self.coverage > 0 and n > self.min_tokens + self.window:
            rows = view.attention(self.window)
            votes = rows[..., : n - self.window].mean(-2)
            scores = avg_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)
            always = scores.new_full((*scores.shape[:2], self.window), torch.inf)
            return keep_top(torch.cat([scores, always], dim=-1), self.kept(scores, lengths), view.mask)
        return TokenMap.identity(n, (len(lengths), 1), view.mask.device)
