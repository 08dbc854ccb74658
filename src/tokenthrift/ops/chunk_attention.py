"""Attention in which each block of queries reads a few chunks of the keys before it, and nothing of the rest.

Blocks and chunks are given by their edges: ``[0, 3, 8]`` are the tokens 0 to 2 and 3 to 7. Chunks may differ in length.
All functions are for one sequence without padding, whose heads come first.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from .gathered import gather_rows


@dataclass(frozen=True, eq=False)
class Reads:
    """Which keys every block of queries reads, always among those that its last query sees.

    Attributes:
        blocks: ``(blocks + 1,)`` int64, edges of the query blocks.
        chunks: ``(chunks + 1,)`` int64, edges of the key chunks.
        first: every block reads so many first keys.
        recent: ``(blocks,)`` int64, and all keys from this one on; a block with 0 is dense.
        taken: ``(heads or 1, blocks, chunks)`` int64, and so many keys of each chunk, from where the first keys end.
    """

    blocks: Tensor
    chunks: Tensor
    first: int
    recent: Tensor
    taken: Tensor

    def of_block(self, block: int) -> Tensor:
        """``(heads or 1, end)`` bool: what this block reads of the keys up to its own last one."""
        token = torch.arange(int(self.blocks[block + 1]), device=self.chunks.device)
        chunk = torch.searchsorted(self.chunks, token, right=True) - 1
        offset = token - self.chunks[chunk].clamp(min=self.first)
        always = (token < self.first) | (token >= self.recent[block])
        return always | ((offset >= 0) & (offset < self.taken[:, block, chunk]))


def edges_from_end(n: int, size: int) -> Tensor:
    """Edges of blocks of ``size`` tokens, of which the first may be shorter."""
    return torch.tensor([0, *range(n % size or size, n + 1, size)])


def even_edges(n: int, size: int) -> Tensor:
    """Edges of chunks of ``size`` tokens, of which the last may be shorter."""
    return torch.tensor([*range(0, n, size), n])


def similarity_edges(keys: Tensor, chunks: int, window: int, spacing: int) -> Tensor:
    """Edges where the keys change most: where the cosine of the mean key before and after is lowest.

    Args:
        keys: ``(kv_heads, n, dim)``; the heads are taken together.
        chunks: how many at most.
        window: keys on either side that are averaged.
        spacing: edges are more than so many tokens apart; the sharper of two that are closer stays.

    Returns:
        ``(up to chunks + 1,)`` int64.
    """
    n = keys.shape[1]
    chosen = [0, n]
    if n >= 2 * window and chunks > 1:
        means = keys.transpose(0, 1).flatten(1).to(torch.float32).unfold(0, window, 1).mean(-1)
        likeness = cosine_similarity(means[:-window], means[window:], dim=-1)  # of the gap before token window + i
        free = bytearray(b"\1") * (n + 1)
        for gap in (likeness.argsort(stable=True) + window).tolist():
            if len(chosen) > chunks:
                break
            if free[gap]:
                chosen.append(gap)
                low, high = max(gap - spacing, 0), min(gap + spacing + 1, n + 1)
                free[low:high] = bytes(high - low)
    return torch.tensor(sorted(chosen), device=keys.device)


def chunk_vectors(x: Tensor, edges: Tensor) -> Tensor:
    """Sum over each chunk, divided by the root of its length: ``(heads, n, dim)`` to ``(heads, chunks, dim)`` float32.

    A mean would make long chunks, whose tokens average out, smaller than short ones; a sum would make them larger.
    """
    sizes = edges.diff()
    number = torch.arange(len(sizes), device=x.device).repeat_interleave(sizes)
    sums = torch.zeros(x.shape[0], len(sizes), x.shape[-1], dtype=torch.float32, device=x.device)
    return sums.index_add_(1, number, x.to(torch.float32)) / sizes.sqrt().unsqueeze(-1)


def take_best(scores: Tensor, sizes: Tensor, count: Tensor) -> Tensor:
    """Take the best-scored tokens, where the tokens of a chunk all have its score; the last chunk may be cut.

    Args:
        scores: ``(heads, blocks, chunks)``.
        sizes: ``(blocks, chunks)`` int64, how many tokens of each chunk there are to take.
        count: ``(blocks,)`` int64, how many to take.

    Returns:
        ``(heads, blocks, chunks)`` int64, how many tokens of each chunk are taken.
    """
    count = count.minimum(sizes.sum(-1))
    taken = torch.zeros(scores.shape, dtype=torch.int64, device=scores.device)
    if not bool(count.any()):
        return taken
    enough = -(-int(count.max()) // int(sizes[sizes > 0].min()))  # of even the shortest chunks
    scores = scores.masked_fill(sizes == 0, float("-inf"))
    order = scores.topk(min(enough, scores.shape[-1]), dim=-1).indices
    ranked = sizes.expand_as(scores).gather(-1, order)
    left = count.unsqueeze(-1) - (ranked.cumsum(-1) - ranked)
    return taken.scatter_(-1, order, left.clamp(min=0).minimum(ranked))


def attend_reads(
    queries: Tensor, keys: Tensor, values: Tensor, reads: Reads | None, scaling: float
) -> tuple[Tensor, float]:
    """Causal attention over what each block of queries reads, block by block: nothing else is computed.

    Args:
        queries: ``(heads, n, dim)``.
        keys, values: ``(kv_heads, n, dim)``; groups are consecutive heads.
        reads: its choices are those of all query heads, or one for all; None reads everything.
        scaling: factor on ``q·k``.

    Returns:
        ``(heads, n, dim of values)``, and the share of the keys up to each query's block that was read.
    """
    heads, n, _ = queries.shape
    if reads is None:
        return _attend(queries, keys, values, None, scaling), 1.0
    keys, values = keys.contiguous(), values.contiguous()  # once, and not for every block that gathers rows
    edges, dense = reads.blocks.tolist(), (reads.recent == 0).tolist()
    out = queries.new_empty(heads, n, values.shape[-1])
    lead = next((i for i, whole in enumerate(dense) if not whole), len(dense))
    stop = edges[lead]  # the first blocks, if dense, are together a shorter prompt
    if lead:
        out[:, :stop] = _attend(queries[:, :stop], keys[:, :stop], values[:, :stop], None, scaling)
    visible = read = sum(end * (end - start) for start, end in pairwise(edges[: lead + 1]))
    for block in range(lead, len(dense)):
        start, stop = edges[block : block + 2]
        position = torch.arange(start, stop, device=keys.device)[:, None]
        if dense[block]:
            count, k, v = stop, keys[:, :stop], values[:, :stop]
            seen = torch.arange(stop, device=keys.device) <= position
        else:
            index, counts = _columns(reads.of_block(block))
            count = int(counts.sum()) // len(counts)
            if len(index) == 1:
                k, v = (x.index_select(1, index[0]) for x in (keys, values))
            else:
                k, v = (gather_rows(x[None], index[None])[0] for x in (keys, values))
            seen = index[:, None] <= position
            if count < index.shape[1]:
                seen &= torch.arange(index.shape[1], device=keys.device) < counts[:, None, None]
        out[:, start:stop] = _attend(queries[:, start:stop], k, v, seen, scaling)
        visible += stop * (stop - start)
        read += count * (stop - start)
    return out, read / visible


def _attend(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scaling: float) -> Tensor:
    q, k, v = queries[None], keys[None], values[None]
    if seen is None:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)[0]
    # With a mask of three dimensions the matrices would be made after all.
    seen = seen.view(1, -1, *seen.shape[-2:])
    return scaled_dot_product_attention(q, k, v, seen, scale=scaling, enable_gqa=True)[0]


def _columns(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """``(heads, n)`` bool to the indices of what is true, ``(heads, most)`` in order, and how many each row has."""
    row, column = chosen.nonzero(as_tuple=True)
    counts = chosen.sum(-1)
    slot = torch.arange(len(column), device=chosen.device) - (counts.cumsum(0) - counts)[row]
    index = column.new_zeros(len(counts), int(counts.max()))
    index[row, slot] = column
    return index, counts
