"""TreeKV: neighbours compete, so that what is far away thins out evenly."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.attention import group_mean
from .repeated import check_every


@method(
    "tree_kv",
    stage="cache",
    paper="TreeKV: Smooth Key-Value Cache Compression with Tree Structures",
    arxiv="2501.04987",
    needs=("keys", "attention", "received", "asked", "again", "mask"),
    status="partial",
)
class TreeKV:
    """Keep sinks, the newest entries and, between these, the winners of a tournament between neighbours.

    Each eviction compares two neighbours at a place that moves from the oldest entry to the newest and then starts
    over; the one that got less attention on average over the queries so far goes. Entries that are further away have
    been through more rounds: the cache is sparse there and dense near the end. While the prompt is reduced, blocks of
    tokens compete as a whole, by the attention of the prompt's last block. Use it with ``every=1`` to follow the paper
    while decoding.

    Partial: no code of the authors is public. Assumed are the size of a block, that heads which share a key/value head
    decide together, and that tokens which fill no block go first. Kept entries stay at their true positions; the paper
    gives them consecutive ones.

    Args:
        budget: entries to keep per key/value head: a count, or a ratio in (0, 1] of the prompt.
        sinks: how many of the first tokens stay, at least 1.
        recent: share of the budget, from 0 to 1, that the sinks and the newest entries get.
        block: tokens that compete together in the prompt.
        every: reduce again whenever so many tokens have come since; 0 reduces once, after the first forward.
    """

    budget: int | float = 512
    sinks: int = 4
    recent: float = 0.5
    block: int = 32
    every: int = 0

    def __post_init__(self) -> None:
        count = Budget.of(self.budget).count
        if self.sinks < 1 or (count is not None and count <= self.sinks):
            raise ThriftError(f"tree_kv needs 1 <= sinks < budget, got sinks={self.sinks}, budget={self.budget}")
        if not 0 <= self.recent <= 1:
            raise ThriftError(f"tree_kv needs 0 <= recent <= 1, a share of the budget, got {self.recent}")
        if self.block < 1:
            raise ThriftError(f"tree_kv needs a block of at least 1 token, got {self.block}")
        check_every("tree_kv", self.every, self.budget)

    def reduce(self, view: View) -> TokenMap:
        batch, kv_heads, n, _ = view.keys.shape
        lengths = view.mask.sum(-1)
        counts = Budget.of(self.budget).tokens_of(lengths)
        if bool((counts == lengths).all()):
            return TokenMap.identity(n, (batch, kv_heads), view.keys.device)
        if view.again:
            score, block = view.received / view.asked, 1
            seen = view.asked.masked_fill(~view.mask[:, None], 0).amax((1, 2))  # the first sink has met every query
        else:
            score, block = group_mean(view.attention(min(self.block, n)).mean(-2), kv_heads), self.block
            seen = lengths
        kept = torch.full((batch, kv_heads, int(counts.max())), -1, device=score.device)
        rows = zip(counts.tolist(), lengths.tolist(), seen.tolist(), strict=True)
        for row, (count, length, tokens) in enumerate(rows):
            start = n - length
            kept[row, :, :count] = start + self._row(score[row, :, start:], count, tokens - length, block)
        return TokenMap.select(kept, n)

    def _row(self, score: Tensor, count: int, evicted: int, block: int) -> Tensor:
        """``(kv_heads, count)``: what is left of ``(kv_heads, entries)`` when ``evicted`` more were gone before."""
        n = score.shape[-1]
        sinks = min(self.sinks, count)
        newest = max(round(count * self.recent) - sinks, 0)
        middle = torch.arange(sinks, n - newest, device=score.device).expand(len(score), -1)
        room = count - sinks - newest
        newest += room % block  # the tree keeps whole blocks
        room //= block
        spare = n - newest - sinks
        middle = middle[:, spare % block : spare].unflatten(-1, (-1, block))
        means = score.gather(-1, middle.flatten(-2)).view(middle.shape).mean(-1)
        winners = tournament(means, room, evicted // block % max(room, 1))
        middle = middle.gather(-2, winners.unsqueeze(-1).expand(-1, -1, block)).flatten(-2)
        ends = [torch.arange(*ends, device=score.device).expand(len(score), -1) for ends in ((sinks,), (n - newest, n))]
        return torch.cat([ends[0], middle, ends[1]], dim=-1)


def tournament(score: Tensor, room: int, start: int) -> Tensor:
    """The entries that are left when, one by one, more arrive than there is room for and a neighbour goes for each.

    Eviction number ``i`` compares the entries at the places ``p`` and ``p + 1``, where ``p`` is ``start + i`` modulo
    ``room``. Between two starts from the left these pairs do not overlap, so they are compared at once.

    Args:
        score: ``(heads, entries)``; of equal ones the newer stays.
        room: how many to keep.
        start: the place of the first comparison, below ``room``.

    Returns:
        ``(heads, room)`` int64, in order.
    """
    left = torch.arange(score.shape[-1], device=score.device).expand(score.shape)
    if room == 0:
        return left[:, :0]
    while (surplus := left.shape[-1] - room) > 0:
        pairs = min(surplus, room - start)
        end = start + 2 * pairs
        first, second = left[:, start:end].unflatten(-1, (pairs, 2)).unbind(-1)
        winner = torch.where(score.gather(-1, first) > score.gather(-1, second), first, second)
        left = torch.cat([left[:, :start], winner, left[:, end:]], dim=-1)
        start = (start + pairs) % room
    return left
