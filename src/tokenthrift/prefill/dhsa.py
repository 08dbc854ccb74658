"""DHSA: chunks of the prompt tell blocks of queries which tokens to read."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.view import View
from ..ops.chunk_attention import Reads, chunk_vectors, edges_from_end, even_edges, similarity_edges, take_best

PATTERNS = ("chunks", "a_shape", "vertical_slash")


@method(
    "dhsa",
    stage="prefill",
    paper="Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs",
    arxiv="2510.24606",
    needs=("queries", "keys"),
    status="partial",
)
class DHSA:
    """Let each block of the prompt's queries read only the chunks of keys that resemble it, and the tokens around it.

    A block of queries and a chunk of keys are each known by one vector, the sum of their tokens over the root of their
    number. The product of the two is the score of the chunk and of each of its tokens; the block reads the best-scored
    tokens up to the budget, and cuts the chunk that does not fit. Causality is exact, and the cache and all positions
    are those of the whole prompt. Blocks whose budget covers all that they see are dense. So is decoding, as in the
    authors' code, and layers with a sliding window stay as they are. There are three patterns:

    - ``"chunks"``: chunks of different lengths, which end where the text turns, and one choice for all heads. The first
      and the nearest tokens are always read; the last block is dense. **Assumed**: the paper predicts the ends with a
      small trained network. This needs no training: chunks end where the cosine between the mean keys on either side
      is lowest. Given the ends, the choice is that of the authors' first code with ``sinks=0``; their first tokens
      displace the earliest chosen, here these are set aside before the others are ranked.
    - ``"a_shape"``: chunks of one length, and each head chooses for itself, as in the authors' newer code. The first
      and the newest chunk are always read.
    - ``"vertical_slash"``: the same, but the last block of queries chooses: the chunks that it likes are good for all
      blocks, and so are those as far from them as the ones that it likes are from it. A block's own chunks are always
      read; the last block, and those that begin within the budget, are dense.

    The last two choose what the authors' code does for prompts of whole blocks and chunks; others are filled up there,
    and here the first block and the last chunk are shorter.

    Args:
        budget: keys that a block reads: a count, or a ratio in (0, 1] of the prompt. What is
            always read is read also where a small ratio of a short prompt is less.
        block: queries that choose together, counted from the prompt's end.
        chunk: tokens in a chunk, on average for ``"chunks"``.
        pattern: one of the three.
        sinks: for ``"chunks"``: how many first tokens are always read.
        local: for ``"chunks"``: how many tokens up to a block's last are always read, at least the block.
        window: for ``"chunks"``: keys on either side that are compared.
        spacing: for ``"chunks"``: two ends are further apart than this.

    Raises:
        ThriftError: a budget that no more than covers what is always read, and parameters below these bounds.
    """

    budget: int | float = 0.25
    block: int = 64
    chunk: int = 32
    pattern: str = "chunks"
    sinks: int = 128
    local: int = 128
    window: int = 4
    spacing: int = 8

    place: ClassVar[str] = "blocks"

    def __post_init__(self) -> None:
        Budget.of(self.budget)
        if self.pattern not in PATTERNS:
            raise ThriftError(f"dhsa knows the patterns {', '.join(PATTERNS)}, got '{self.pattern}'")
        if min(self.block, self.chunk, self.window) < 1 or min(self.sinks, self.spacing) < 0:
            raise ThriftError("dhsa needs block, chunk and window of at least 1, sinks and spacing of at least 0")
        if self.pattern == "chunks" and self.local < self.block:
            raise ThriftError(
                f"dhsa local={self.local} is less than block={self.block}: queries would not read themselves"
            )
        always = {
            "chunks": self.sinks + self.local,
            "a_shape": 2 * self.chunk,
            "vertical_slash": self.chunk + self.block,
        }[self.pattern]
        if isinstance(self.budget, int) and self.budget <= always:
            raise ThriftError(f"dhsa reads {always} tokens in any case: give a budget above that, got {self.budget}")

    def select(self, view: View) -> Reads | None:
        """What each block of queries of one prompt reads; None for everything."""
        queries, keys = view.queries[0], view.keys[0]
        n = keys.shape[1]
        budget = Budget.of(self.budget).tokens(n)
        if budget >= n:
            return None
        if self.pattern != "chunks":
            budget = max(budget // self.chunk, 1) * self.chunk
        blocks = edges_from_end(n, self.block).to(keys.device)
        choose = self._by_chunks if self.pattern == "chunks" else self._by_pattern
        reads = choose(queries, keys, blocks, budget)
        return reads if bool(reads.recent.any()) else None

    def _by_chunks(self, queries: Tensor, keys: Tensor, blocks: Tensor, budget: int) -> Reads:
        chunks = similarity_edges(keys, keys.shape[1] // self.chunk, self.window, self.spacing)
        # The heads vote by their mean.
        scores = chunk_vectors(queries.mean(0, True), blocks) @ chunk_vectors(keys.mean(0, True), chunks).mT
        recent = (blocks[1:] - self.local).clamp(min=0)
        recent = recent.masked_fill(blocks[1:] <= budget, 0)
        recent[-1] = 0
        left = torch.full_like(recent, max(budget - self.sinks - self.local, 0)).masked_fill(recent == 0, 0)
        taken = take_best(scores, _between(chunks, self.sinks, recent), left)
        return Reads(blocks, chunks, self.sinks, recent, taken)

    def _by_pattern(self, queries: Tensor, keys: Tensor, blocks: Tensor, budget: int) -> Reads:
        chunks = even_edges(keys.shape[1], self.chunk).to(keys.device)
        oldest = blocks[:-1] // self.chunk  # the chunks that a block itself lies in
        newest = (blocks[1:] - 1) // self.chunk
        by_block = chunk_vectors(queries, blocks)
        by_chunk = chunk_vectors(keys, chunks).repeat_interleave(len(queries) // len(keys), dim=0)
        dense = (newest + 1) * self.chunk <= budget
        if self.pattern == "a_shape":
            scores, band = by_block @ by_chunk.mT, newest
        else:
            scores = _vertical_slash(by_block[:, -1:] @ by_chunk.mT, budget // self.chunk, oldest, newest)
            band = oldest
            dense |= blocks[:-1] < budget
            dense[-1] = True
        always = (newest - band + 1 + (band > 0)) * self.chunk
        recent = (band * self.chunk).masked_fill(dense, 0)
        # Chunks of the block itself compete with the others in the authors' code, though they are read in any case.
        left = (budget - always).clamp(min=0).masked_fill(dense, 0)
        taken = take_best(scores, _between(chunks, self.chunk, newest * self.chunk), left)
        return Reads(blocks, chunks, self.chunk, recent, taken)


def _between(chunks: Tensor, first: int, end: Tensor) -> Tensor:
    """``(blocks, chunks)``: how many tokens each chunk has between the first ones and each block's ``end``."""
    return (chunks[1:].minimum(end[:, None]) - chunks[:-1].clamp(min=first)).clamp(min=0)


def _vertical_slash(liked: Tensor, count: int, oldest: Tensor, newest: Tensor) -> Tensor:
    """``(heads, blocks, chunks)`` scores from those that the last block of queries gives, ``(heads, 1, chunks)``."""
    heads, _, n = liked.shape

    def best(k: int) -> Tensor:
        index = liked.topk(k, dim=-1).indices
        return torch.zeros_like(liked).scatter_(-1, index, liked.gather(-1, index))

    vertical, by_distance = best(count // 2), best(count - count // 2).flip(-1)
    slash = liked.new_zeros(heads, len(oldest), n)
    for step in range(int((newest - oldest).max()) + 1):
        distance = (oldest + step)[:, None] - torch.arange(n, device=liked.device)
        there = (distance >= 0) & ((oldest + step) <= newest)[:, None]
        slash += by_distance.squeeze(1)[:, distance.clamp(0, n - 1)] * there
    return vertical + slash
