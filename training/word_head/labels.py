"""What the words of a text are worth, by a language model's likelihoods of what follows them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from tokenthrift.models.scoring import Scorer
from tokenthrift.ops.tokens import Span, encode

AHEAD = 16
"""Tokens behind a word whose prediction may suffer from its removal."""
TOGETHER = 12
"""Words whose removal is tried in one forward."""


@dataclass(frozen=True)
class Judged:
    """A word's tokens, and what the language model says of it.

    Attributes:
        tokens: how many it has.
        own: nats that its tokens cost, given all of the passage before it.
        later: nats that each of the next tokens costs more without it; empty where that was not asked.
    """

    tokens: int
    own: float
    later: tuple[float, ...] = ()


@torch.inference_mode()
def judge(scorer: Scorer, text: str, units: Sequence[Span], asked: Sequence[int], ahead: int = AHEAD) -> list[Judged]:
    """What each word of a passage costs, and what the removal of those asked for costs the tokens behind them.

    A word is really removed: its tokens are neither read nor leave a gap in the positions. What stands before it is
    read once; then only the tokens behind the words are read, those of several words in one forward.

    Args:
        text: short enough for one forward of the model.
        units: its words, in order.
        asked: numbers of the words that are removed, one at a time.
        ahead: tokens behind the word that count.
    """
    ids, spans = encode(scorer.tokenizer, [text])[0]
    ends = [end for _, end in units]
    first = [0] * (len(units) + 1)  # a token belongs to the word that its last character lies in
    for _, end in spans:
        first[min(bisect_right(ends, end - 1), len(units) - 1) + 1] += 1
    for i in range(len(units)):
        first[i + 1] += first[i]
    start = scorer.prefix if scorer.prefix is not None else ids[0]
    row = torch.tensor([[start, *ids]], device=scorer.model.device)
    cache = DynamicCache(config=scorer.model.config)
    states = scorer.states(input_ids=row, past_key_values=cache, use_cache=True)[0, :-1]
    nats = scorer.nats(states, row[0, 1:]).cpu()

    later: dict[int, tuple[float, ...]] = {}
    open_ = [i for i in asked if first[i] < first[i + 1] < len(ids)]
    for at in range(0, len(open_), TOGETHER):
        group = open_[at : at + TOGETHER]
        cuts = [(first[i], first[i + 1], min(first[i + 1] + ahead, len(ids))) for i in group]
        for i, cut, without in zip(group, cuts, _without(scorer, row, cache, cuts), strict=True):
            later[i] = tuple((without - nats[cut[1] : cut[2]]).tolist())
    return [
        Judged(first[i + 1] - first[i], float(nats[first[i] : first[i + 1]].sum()), later.get(i, ()))
        for i in range(len(units))
    ]


def _without(scorer: Scorer, row: Tensor, cache: Any, cuts: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """Nats of ``ids[b:c]`` behind ``ids[:a]``, for each cut ``(a, b, c)``; ``row`` has one token before the ids."""
    length = row.shape[1]
    # The token before the word is fed again: its state predicts the first one behind the word.
    fed = [torch.cat([row[0, a : a + 1], row[0, b + 1 : c]]) for a, b, c in cuts]
    sizes = [len(f) for f in fed]
    mask = torch.full((sum(sizes), length + sum(sizes)), torch.finfo(torch.float32).min, device=row.device)
    positions, at = [], 0
    for (a, _, _), size in zip(cuts, sizes, strict=True):
        mask[at : at + size, :a] = 0
        own = torch.full((size, size), torch.finfo(torch.float32).min, device=row.device).triu(1)
        mask[at : at + size, length + at : length + at + size] = own
        positions.append(torch.arange(a, a + size, device=row.device))
        at += size
    states = scorer.states(
        input_ids=torch.cat(fed)[None],
        attention_mask=mask[None, None].to(scorer.model.dtype),
        position_ids=torch.cat(positions)[None],
        past_key_values=cache,
        use_cache=True,
    )[0]
    cache.crop(-sum(sizes))
    targets = torch.cat([row[0, b + 1 : c + 1] for _, b, c in cuts])
    return list(scorer.nats(states, targets).cpu().split(sizes))
