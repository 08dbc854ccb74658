"""How much of what heads attend to later is among the tokens that a method would keep."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ThriftError
from ..core.view import View
from ..ops.attention import attention_rows, group_mean
from .attention import Watcher
from .cache_stage import cache_view
from .decoder import context_length
from .measuring import measure_layers, written

_ROWS = 64  # of attention, that exist at once


def score_budgets(
    model: Any,
    score: Callable[[View], Tensor],
    *,
    tokens: int = 1024,
    queries: int = 128,
    steps: int = 32,
    seed: int = 0,
    ids: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[list[float]]]:
    """Of every head: the attention that later tokens lose nothing of, by the share of a text that is kept.

    One forward over a text, with all its tokens. Its last ``queries`` tokens ask; of those before them so many are kept
    as score highest. What a query gives to the others is lost.

    Args:
        model: a decoder-only language model.
        score: ``view -> (batch, kv_heads, tokens)``, the higher the earlier kept.
        tokens: length of the text, which the model writes by itself.
        queries: how many of its last tokens ask.
        steps: number of shares: ``1 / steps``, ``2 / steps``, … up to 1.
        seed: of the text.
        ids: ``(1, tokens)``, a text of your own in its place.
        progress: called with the number of layers done and of all.

    Returns:
        ``[layer][kv_head][0 … steps]`` of attention in [0, 1], rising; means over the queries and the query heads that
        share a key/value head. Layers with a sliding window have no heads here.

    Raises:
        ThriftError: numbers that do not fit each other, or a text longer than the model's positions.
    """
    for option, value in {"tokens": tokens, "queries": queries, "steps": steps, "seed": seed}.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ThriftError(f"budgets of heads are measured with a whole number as {option}, not {value!r}")
    length, longest = tokens if ids is None else int(ids.shape[-1]), context_length(model)
    if min(queries, steps) < 1 or not queries + steps <= length <= (longest or length):
        raise ThriftError(
            f"budgets of heads need queries and steps of at least 1, together at most the text's {length} tokens, and "
            f"of these at most {longest or 'any number'}; got queries={queries}, steps={steps}"
        )
    text = written(model, tokens, seed) if ids is None else ids
    found = measure_layers(model, text, partial(_Mass, score, queries, steps), progress)
    return [[] if held is None else held.tolist() for held in found]


class _Mass(Watcher):
    """Watches one layer."""

    def __init__(
        self,
        score: Callable[[View], Tensor],
        queries: int,
        steps: int,
        layer: int,
        layers: int,
        note: Callable[[Tensor], None],
    ) -> None:
        self.score, self.queries, self.steps, self.note = score, queries, steps, note
        self.layer, self.layers = layer, layers

    def after(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> None:
        n = key.shape[-2]
        prompt = n - self.queries
        q, k, v = (t[:, :, :prompt] for t in (query, key, value))
        order = self.score(cache_view(q, k, v, None, scaling, self.layer, self.layers)).argsort(-1, descending=True)
        asked = torch.zeros(*query.shape[:2], prompt, device=key.device)
        for start in range(prompt, n, _ROWS):
            end = min(start + _ROWS, n)
            asked += attention_rows(query[:, :, start:end], key[:, :, :end], scaling)[..., :prompt].sum(-2)
        ordered = (group_mean(asked, key.shape[1]) / self.queries).gather(-1, order)[0]
        lost = ordered.flip(-1).cumsum(-1).flip(-1)  # by all from here on
        lost = torch.cat([lost, torch.zeros_like(lost[:, :1])], dim=-1)
        cuts = torch.arange(self.steps + 1, device=key.device) * prompt // self.steps
        self.note((1 - lost[:, cuts]).clamp(0, 1))
