"""SpecKV: tokens that a draft model expects show which entries of the prompt will be read."""

from __future__ import annotations

from os import fspath
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import MethodInfo, method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..models.drafts import Given, as_draft, load_draft
from ..models.lookahead import Writer, check_layers
from ..ops.topk import keep_top
from .snapkv import check_window


@method(
    "speckv",
    stage="cache",
    paper="Draft-based Approximate Inference for LLMs",
    arxiv="2506.08373",
    needs=("keys", "attention", "ahead", "mask"),
    status="partial",
)
class SpecKV:
    """Keep the entries that drafted tokens and the last tokens of the prompt attend to most, and these last ones.

    A draft goes through the model behind the prompt, in the same forward, and is then forgotten. An entry's score is
    the highest attention from any of these queries, over the query heads that share a key/value head, then the highest
    among its neighbours.

    The draft is written greedily, and goes on where the text would end. Without a draft model the model's own first
    layers write it: that is not the paper's method, and as a guess of what follows only as good as those layers.

    Partial: which entries are kept equals the authors' code, but the attention within the prompt is dense; their sparse
    prefill is left out.

    Args:
        budget: entries to keep per key/value head, the window included: a count, or a ratio in (0, 1] of the prompt.
        draft: the draft model: a pack, folder or hub id, or a loaded model; it must have the model's vocabulary.
        layers: without a draft model, how many of the model's own layers write the draft; None is half of them.
        lookahead: tokens to draft. The authors draft as many as will be generated.
        window: how many of the prompt's last queries vote too. Shrinks when a ratio leaves less room than that.
        kernel: width of the pooling, odd; 1 switches it off.
        reduction: "max" or "mean" over the queries.
        pool: "max" or "mean" over neighbours.

    Raises:
        ThriftError: a parameter outside its range; when it is applied: a draft model that cannot be loaded or has
            another vocabulary, layers from which a draft cannot be taken back; when generating: no token ids.
    """

    budget: int | float = 512
    draft: Any = None
    layers: int | None = None
    lookahead: int = 16
    window: int = 32
    kernel: int = 7
    reduction: str = "max"
    pool: str = "max"

    def __post_init__(self) -> None:
        check_window("speckv", self.budget, self.window, self.kernel)
        if self.lookahead < 0:
            raise ThriftError(f"speckv needs a lookahead of at least 0 tokens, got {self.lookahead}")
        for name in ("reduction", "pool"):
            if getattr(self, name) not in ("max", "mean"):
                raise ThriftError(f"speckv knows {name}='max' and 'mean', not {getattr(self, name)!r}")
        if self.draft is not None:
            object.__setattr__(self, "draft", as_draft("speckv", "draft", self.draft))
        if self.layers is not None and (self.draft is not None or self.layers < 1):
            raise ThriftError("speckv takes layers of at least 1, and only where no draft model is given")

    def bind(self, model: Any) -> _Drafted:
        """Itself, with somebody to write drafts for this model."""
        check_layers("speckv", model)
        draft, tokenizer = self.draft, None
        if isinstance(draft, Given):
            draft = draft.model
        elif draft is not None:
            draft, tokenizer = load_draft(fspath(draft), str(model.device), model.dtype)
        return _Drafted(self, Writer("speckv", model, draft, self.layers, tokenizer))

    def score(self, view: View) -> Tensor:
        """``(batch, kv_heads, tokens)``: the highest vote in [0, 1] for each entry, then the window from 2 on."""
        batch, kv_heads, n, _ = view.keys.shape
        window = self._window(n)
        rows = view.attention(window + view.ahead)[..., : n - window]
        votes = rows.reshape(batch, kv_heads, -1, n - window)
        votes = votes.amax(2) if self.reduction == "max" else votes.mean(2)
        smooth = max_pool1d if self.pool == "max" else avg_pool1d
        votes = smooth(votes, self.kernel, stride=1, padding=self.kernel // 2)
        recent = 2 + torch.arange(window, device=votes.device, dtype=votes.dtype)
        return torch.cat([votes, recent.expand(batch, kv_heads, window)], dim=-1)

    def reduce(self, view: View) -> TokenMap:
        batch, kv_heads, n, _ = view.keys.shape
        budget = Budget.of(self.budget)
        if budget.tokens(n) == n:
            return TokenMap.identity(n, (batch, kv_heads), view.keys.device)
        # Max pooling leaves neighbours with equal scores, which topk would part at random: the earlier ones go first.
        order = self.score(view).argsort(dim=-1, descending=True, stable=True)
        return keep_top(-order.argsort(dim=-1).to(torch.float32), budget, view.mask)

    def _window(self, n: int) -> int:
        return min(self.window, Budget.of(self.budget).tokens(n))


class _Drafted:
    """SpecKV for one model."""

    def __init__(self, method: SpecKV, writer: Writer) -> None:
        self.info: MethodInfo = method.info  # type: ignore[attr-defined]
        self.reduce = method.reduce
        self.method, self.writer = method, writer

    def draft(self, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """What to look at behind the prompts; nothing where all of them are kept."""
        n = ids.shape[1]
        lengths = [n] if mask is None else mask.sum(-1).tolist()
        budget = Budget.of(self.method.budget)
        if not self.method.lookahead or all(budget.tokens(length) == length for length in lengths):
            return None
        return self.writer.write(ids, mask, self.method.lookahead)

    def cost(self, n: int, tokens: int) -> float:
        """FLOPs of drafting so many tokens behind a prompt of ``n``."""
        return self.writer.cost(n, tokens)
