"""EMS: what will not be kept is either evicted, or merged into what is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.attention import attention_received, group_mean
from ..ops.rows import age
from ..ops.topk import keep_top
from .repeated import check_every

_BLOCK = 1024  # candidates whose similarities to all centres exist at once


@method(
    "ems",
    stage="cache",
    paper="EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on Global-Local Importance",
    arxiv="2412.08521",
    needs=("keys", "values", "queries", "attention", "received", "asked", "again", "scaling", "mask"),
    status="partial",
)
class EMS:
    """Keep the entries of the highest global-local score; evict the lowest, merge those in between into similar ones.

    The global score is the attention that an entry received, per query that could see it; the local score is the same
    over the last ``window`` queries. Both are scaled to one mean, and the larger counts. In every head the best entries
    are centres; the next best are merged into the centre that is most like them in key and value, as averages weighted
    by score; the rest is evicted. A candidate less similar than ``threshold`` falls to one more centre, the zero class,
    which is then left out: so all heads do the same steps, though each merges and evicts a different number.

    Partial: there is no public code, and the paper's text was not at hand in full. Assumed are the larger of the two
    scores, how many candidates there are, the threshold, that the window itself stays, and that keys are averaged as
    they are stored, after their rotation. While decoding (``every``), an entry's attention counts for all tokens in it,
    its merges go on from its mean so far, and scores are means over the query heads that share it.

    Args:
        budget: entries to keep per key/value head: a count, or a ratio in (0, 1] of the prompt.
        window: how many of the last queries make the local score; their own entries are centres. Shrinks when a ratio
            leaves less room than that.
        candidates: entries that may be merged, per entry that is kept; 0 only evicts.
        threshold: least similarity, in [0, 1], to merge at: cosine of the keys times cosine of the values.
        every: reduce again whenever so many tokens have come since; 0 reduces once, after the first forward.

    Raises:
        ThriftError: a parameter outside its range.
    """

    budget: int | float = 512
    window: int = 32
    candidates: float = 1.0
    threshold: float = 0.6
    every: int = 0

    def __post_init__(self) -> None:
        count = Budget.of(self.budget).count
        if self.window < 1 or (count is not None and count <= self.window):
            raise ThriftError(f"ems needs 1 <= window < budget, got window={self.window}, budget={self.budget}")
        if not 0 <= self.candidates < float("inf"):
            raise ThriftError(f"ems needs a finite number of candidates of at least 0, got {self.candidates}")
        if not 0 <= self.threshold <= 1:
            raise ThriftError(f"ems needs a threshold in [0, 1], got {self.threshold}")
        check_every("ems", self.every, self.budget)

    @property
    def lookback(self) -> int:
        """How many of the last queries are read when the cache is reduced again."""
        return self.window

    def score(self, view: View) -> Tensor:
        """``(batch, kv_heads, tokens)``: the global-local score."""
        ages, window = age(view.mask)[:, None], self._window(view)
        near = (rows := view.attention(window)).sum(-2) / ages.clamp(max=rows.shape[-2])
        if view.again:
            everywhere, near = view.received / view.asked, group_mean(near, view.keys.shape[1])
        else:
            everywhere = attention_received(view.queries, view.keys, view.scaling, view.mask) / ages
        # A padded row may have fewer queries than the window: its means are of what there is.
        total = [s.sum(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny) for s in (everywhere, near)]
        return group_mean(torch.maximum(near, everywhere * (total[1] / total[0])), view.keys.shape[1])

    def reduce(self, view: View) -> TokenMap:
        budget, score = Budget.of(self.budget), self.score(view)
        recent = age(view.mask)[:, None] <= self._window(view)
        centres = keep_top(score.masked_fill(recent, float("inf")), budget, view.mask)
        lengths = view.mask.sum(-1)
        count = budget.tokens_of(lengths).to(lengths.device)
        more = torch.minimum((count * self.candidates).round().long(), lengths - count)
        if centres.is_identity or not bool(more.any()):
            return centres
        ranked = score.masked_fill(centres.kept, float("-inf"))
        merging = keep_top(ranked, more, view.mask)
        joined = _nearest(view, merging, centres, self.threshold)
        n = view.keys.shape[-2]
        spare = torch.where(merging.mask, merging.source, n)  # what pads the candidates writes behind the tokens
        group = pad(centres.owner, (0, 1)).scatter(-1, spare, joined)[..., :n]
        return TokenMap.merge(group, centres.n_out, score, anchor=centres.anchors)

    def _window(self, view: View) -> int:
        return min(self.window, Budget.of(self.budget).tokens(view.keys.shape[-2]))


def _nearest(view: View, merging: TokenMap, centres: TokenMap, threshold: float) -> Tensor:
    """``(batch, kv_heads, candidates)``: the centre that each candidate is most similar to, -1 for the zero class."""
    parts = [x.to(torch.float32) for x in (view.keys, view.values)]
    centre = [normalize(centres.apply(part), dim=-1).mT for part in parts]
    nearest = []
    for start in range(0, merging.n_out, _BLOCK):
        block = [normalize(merging.apply(part)[..., start : start + _BLOCK, :], dim=-1) for part in parts]
        # Two that point apart in both are not alike, though the product of their cosines would say so.
        keys, values = ((a @ b).clamp(min=0) for a, b in zip(block, centre, strict=True))
        likeness = (keys * values).masked_fill(~centres.mask.unsqueeze(-2), -1)
        nearest.append(pad(likeness, (0, 1), value=threshold).argmax(-1))  # the zero class comes last: ties merge
    joined = torch.cat(nearest, -1)
    return torch.where((joined < centres.n_out) & merging.mask, joined, -1)
