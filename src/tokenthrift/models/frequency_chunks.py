"""Which pairs of channels of a head rank tokens as the whole head does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ThriftError
from .attention import Watcher
from .decoder import context_length
from .layer_kinds import check_kinds
from .measuring import measure_layers, written


def score_chunks(
    model: Any,
    *,
    tokens: int = 1024,
    queries: int = 64,
    top: int = 128,
    seed: int = 0,
    ids: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[list[float]]]:
    """Of every pair of channels: the share of a head's ``top`` tokens that are also the pair's own, on average.

    A pair is channels ``i`` and ``i + dim / 2``, which most models rotate together (a frequency chunk); the mean is
    over the last ``queries`` tokens of a text and the query heads that share a key/value head. (FASA, arXiv
    2602.03152: contextual agreement.)

    Args:
        model: a decoder-only language model.
        tokens: length of the text, which the model writes by itself.
        queries: how many of its last tokens look back.
        top: how many tokens are compared.
        seed: of the text.
        ids: ``(1, tokens)``, a text of your own in its place.
        progress: called with the number of layers done and of all.

    Returns:
        ``[layer][kv_head][pair]``. Layers with a sliding window have no heads here.

    Raises:
        ThriftError: numbers that do not fit each other, or a text longer than the model's positions; a model whose
            layers keep something else than keys and values.
    """
    check_kinds(model, "the search for frequency chunks", states=True)
    for option, value in {"tokens": tokens, "queries": queries, "top": top, "seed": seed}.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ThriftError(f"frequency chunks are scored with a whole number as {option}, not {value!r}")
    length, longest = tokens if ids is None else ids.shape[-1], context_length(model)
    if min(queries, top) < 1 or not queries + top <= length <= (longest or length):
        raise ThriftError(
            f"frequency chunks need queries and top of at least 1, together at most the text's {length} tokens, and of "
            f"these at most {longest or 'any number'}; got queries={queries}, top={top}"
        )
    text = written(model, tokens, seed) if ids is None else ids
    found = measure_layers(model, text, lambda *at: _Agreement(queries, top, at[-1]), progress)
    return [[] if scores is None else scores.tolist() for scores in found]


def agreement(query: Tensor, key: Tensor, top: int) -> Tensor:
    """``(kv_heads, dim / 2)``: see :func:`score_chunks`.

    Args:
        query: ``(heads, rows, dim)``, of the last tokens.
        key: ``(kv_heads, n, dim)``, of all of them; a query sees those up to its own.
        top: how many tokens are compared.
    """
    (kv_heads, n, dim), rows = key.shape, query.shape[1]
    hidden = torch.arange(n, device=key.device) > torch.arange(n - rows, n, device=key.device)[:, None]
    pairs = torch.arange(dim // 2, device=key.device)
    channels = torch.stack([pairs, pairs + dim // 2], dim=-1)
    scores = []
    for asked, held in zip(query.float().unflatten(0, (kv_heads, -1)), key.float(), strict=True):
        logits = (asked @ held.mT).masked_fill(hidden, float("-inf"))
        best = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, logits.topk(top).indices, True)
        of_pair = []
        for pair in channels:
            part = (asked[..., pair] @ held[:, pair].mT).masked_fill(hidden, float("-inf"))
            of_pair.append(best.gather(-1, part.topk(top, sorted=False).indices).float().mean())
        scores.append(torch.stack(of_pair))
    return torch.stack(scores)


class _Agreement(Watcher):
    """Watches one layer."""

    def __init__(self, queries: int, top: int, note: Callable[[Tensor], None]) -> None:
        self.queries, self.top, self.note = queries, top, note

    def after(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> None:
        self.note(agreement(query[0, :, -self.queries :], key[0], self.top))
