"""Which pairs of channels of a head rank tokens as the whole head does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..core.errors import ThriftError
from .attention import Watcher, watch_attention
from .decoder import context_length, find_attentions
from .layer_kinds import check_kinds


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
    sliding = [getattr(layer, "is_sliding", False) for layer in DynamicCache(config=model.config).layers]
    modules = [m for m in find_attentions(model) if not sliding[int(m.layer_idx)]]  # type: ignore[arg-type]
    found: dict[int, list[list[float]]] = {}

    def make(module: nn.Module) -> _Agreement:
        def note(scores: Tensor) -> None:
            found[int(module.layer_idx)] = scores.tolist()  # type: ignore[arg-type]
            if progress is not None:
                progress(len(found), len(modules))

        return _Agreement(queries, top, note)

    if ids is None:
        ids = written(model, tokens, seed)
    with ExitStack() as undo, torch.inference_mode():
        watch_attention(modules, make, undo)
        model.base_model(input_ids=ids.to(model.device), use_cache=False)
    return [found.get(layer, []) for layer in range(len(sliding))]


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


def written(model: Any, tokens: int, seed: int) -> Tensor:
    """``(1, tokens)``: what the model writes when it may choose freely."""
    config = model.generation_config
    start = next((t for t in (config.bos_token_id, config.eos_token_id) if isinstance(t, int)), 0)
    ids = torch.tensor([[start]], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        text: Tensor = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens - 1,
            min_new_tokens=tokens - 1,  # an end of text does not end it
            do_sample=True,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
        )
    return text
