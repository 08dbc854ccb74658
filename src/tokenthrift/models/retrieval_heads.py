"""Which heads look up earlier tokens: their attention within a block of random tokens that is repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ThriftError
from ..ops.attention import attention_rows
from .attention import Watcher
from .decoder import context_length
from .layer_kinds import check_kinds
from .measuring import measure_layers

_ROWS = 128  # of attention, that exist at once


def score_heads(
    model: Any,
    *,
    block: int | None = None,
    repeats: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[list[float]], list[list[float]], int]:
    """How much of a token's attention goes to its earlier occurrences (echo), and to what followed these (induction).

    The means over all tokens but those of the first block; of the query heads that share a key/value head the highest.
    (RazorAttention, arXiv 2407.15891, section 3.2.)

    Args:
        model: a decoder-only language model.
        block: random tokens that are repeated; None takes the paper's 2,500, or what the model's positions allow.
        repeats: how often they stand in the text.
        seed: of the random tokens.
        progress: called with the number of layers done and of all.

    Returns:
        ``[layer][kv_head]`` of echo and of induction, and the block's length. Layers with a sliding window, which no
        cache method touches, have none.

    Raises:
        ThriftError: a block of less than 2 tokens, fewer than 2 repeats, or a text longer than the model's positions;
            a model whose layers keep something else than keys and values.
    """
    check_kinds(model, "the search for retrieval heads", states=True)
    for option, value in {"block": block, "repeats": repeats, "seed": seed}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ThriftError(f"retrieval heads are scored with a whole number as {option}, not {value!r}")
    longest = context_length(model)
    if block is None:
        block = 2500 if longest is None else min(2500, longest // max(repeats, 1))
    if block < 2 or repeats < 2 or (longest is not None and block * repeats > longest):
        raise ThriftError(
            f"{repeats} times a block of {block} tokens cannot be read: take at least 2 times 2 tokens, and at most "
            f"{longest or 'any number of'} in all"
        )
    draw = torch.Generator().manual_seed(seed)
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(size, (1, block), generator=draw).repeat(1, repeats).to(model.device)
    found = measure_layers(model, ids, lambda *at: _HeadWatcher(block, at[-1]), progress)
    echo, induction = ([[] if both is None else both[kind].tolist() for both in found] for kind in (0, 1))
    return echo, induction, block


class _HeadWatcher(Watcher):
    """Scores one layer's heads when its attention has run."""

    def __init__(self, block: int, note: Callable[[tuple[Tensor, Tensor]], None]) -> None:
        self.block, self.note = block, note

    def after(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> None:
        n, block, kv_heads = key.shape[-2], self.block, key.shape[1]
        sums = torch.zeros(2, query.shape[1], device=key.device)
        for start in range(block, n, _ROWS):
            end = min(start + _ROWS, n)
            rows = attention_rows(query[:, :, start:end], key[:, :, :end], scaling)[0]
            at = torch.arange(start, end, device=key.device)
            for back in range(block, end, block):
                seen = at[at >= back]
                for kind in (0, 1):
                    place = (seen - back + kind).expand(len(rows), -1).unsqueeze(-1)
                    sums[kind] += rows[:, seen - start].gather(-1, place).sum((1, 2))
        scores = (sums / (n - block)).view(2, kv_heads, -1).amax(-1)
        self.note((scores[0], scores[1]))
