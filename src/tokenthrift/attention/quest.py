"""Quest: bounds on a page's keys say which pages a query may attend to."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.view import View
from ..ops.attention import group_mean
from ..ops.gathered import span
from ..ops.growing import Growing

_LARGE = torch.finfo(torch.float32).max


@method(
    "quest",
    stage="attention",
    paper="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
    arxiv="2406.10774",
    needs=("queries", "keys", "mask", "layer", "memory"),
)
class Quest:
    """Read the pages whose keys could give the query the largest products.

    A page of keys is known by its smallest and largest value in every channel, from which follows a bound on the
    product of any of its keys with a query. The pages with the highest bounds are read, and always the newest page.
    Pages are counted from the first column of a batch, so padding shifts the pages of its row.

    Args:
        budget: entries to read per key/value head; whole pages of them.
        page: entries in a page.
        dense: how many of the first layers read everything.
        heads: ``"group"``: the query heads that share a key/value head read the pages that suit them on average,
            ``"query"``: each reads pages of its own, as in the authors' code, which does not share key/value heads.
    """

    budget: int = 512
    page: int = 16
    dense: int = 2
    heads: str = "group"

    def __post_init__(self) -> None:
        Budget.of(self.budget)
        if not 1 <= self.page <= self.budget:
            raise ThriftError(f"quest needs 1 <= page <= budget, got page={self.page}, budget={self.budget}")
        if self.dense < 0:
            raise ThriftError(f"quest needs dense >= 0, the number of layers that read everything, got {self.dense}")
        if self.heads not in ("group", "query"):
            raise ThriftError(f"quest knows heads='group' and heads='query', got '{self.heads}'")

    def select(self, view: View) -> Tensor | None:
        n = view.keys.shape[-2]
        budget, older = self.budget // self.page, (n - 1) // self.page  # pages to read, full pages before the newest
        if view.layer < self.dense or budget > older:
            return None
        scores = page_scores(view.queries, self._bounds(view)[..., :older, :])
        if self.heads == "group":
            scores = group_mean(scores, view.keys.shape[1])
        pages = scores.topk(budget - 1, sorted=False).indices.unsqueeze(-1)
        offsets, newest = span(0, self.page, pages.device), span(older * self.page, n, pages.device)
        return torch.cat([(pages * self.page + offsets).flatten(2), newest.expand(*scores.shape[:2], -1)], dim=-1)

    def _bounds(self, view: View) -> Tensor:
        """Of all full pages; only those that became full since the last step are looked at."""
        known: Growing = view.memory.setdefault("pages", Growing())
        start, end = len(known) * self.page, view.keys.shape[-2] // self.page * self.page
        if end > start:
            mask = None if view.mask is None else view.mask[:, start:end]
            known.append(page_bounds(view.keys[:, :, start:end], self.page, mask))
        return known.rows


def page_bounds(keys: Tensor, page: int, mask: Tensor | None = None) -> Tensor:
    """Largest, then smallest values of every channel in each page, in float32.

    Args:
        keys: ``(batch, kv_heads, n, dim)``, ``n`` a multiple of ``page``.
        mask: ``(batch, n)`` bool; what is false has no part in the bounds.

    Returns:
        ``(batch, kv_heads, pages, 2 dim)``.
    """
    paged = keys.to(torch.float32).unflatten(2, (-1, page))
    if mask is None:
        low, high = paged.aminmax(dim=3)
    else:
        hidden = ~mask.view(mask.shape[0], 1, -1, page, 1)
        high, low = paged.masked_fill(hidden, -_LARGE).amax(3), paged.masked_fill(hidden, _LARGE).amin(3)
    return torch.cat([high, low], dim=-1)


def page_scores(queries: Tensor, bounds: Tensor) -> Tensor:
    """The largest product that a key within the bounds can have with a query: ``(batch, heads, pages)``.

    A positive channel of a query takes the page's largest value, a negative one the smallest: one matrix product.

    Args:
        queries: ``(batch, heads, 1, dim)``.
        bounds: ``(batch, kv_heads, pages, 2 dim)`` of :func:`page_bounds`.
    """
    queries = queries.to(torch.float32)
    signed = torch.cat([queries.clamp(min=0), queries.clamp(max=0)], dim=-1)
    grouped = signed.reshape(signed.shape[0], bounds.shape[1], -1, signed.shape[-1])
    return (grouped @ bounds.mT).flatten(1, 2)
