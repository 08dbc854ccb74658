"""Prompts of many lengths, prefilled without their padding (Prepacking, arXiv 2404.09529).

The prompts lie one behind the other in rows of a batch of one. Positions start anew with each prompt, and attention
runs prompt by prompt, so no mask over a whole row exists. Keys and values go straight into buffers laid out as the
padded batch's cache would be.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..core.errors import ThriftError
from ..ops.bins import pack_bins
from .attention import BASES, PREFIX, answered_by
from .decoder import DecoderAdapter

ROW = 2048
"""Tokens that a row may have at least: shorter ones leave a processor idle."""


@dataclass(frozen=True)
class Packed:
    """Prefilled prompts, laid out as a left-padded batch.

    Attributes:
        input_ids, attention_mask: ``(batch, tokens)``, padded on the left.
        logits: ``(batch, 1, vocabulary)``, of each prompt's last token.
        tokens: how many went through the model; a padded batch has ``input_ids.numel()``.
        keys, values: of each layer, ``(batch, kv_heads, tokens, head_dim)``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    logits: Tensor
    tokens: int
    keys: list[Tensor] = field(repr=False)
    values: list[Tensor] = field(repr=False)
    config: Any = field(repr=False)

    @property
    def inputs(self) -> dict[str, Any]:
        """What ``model.generate`` goes on from, any number of times: each is given a cache of its own.

        That cache has all tokens but each prompt's last, since generation begins with feeding one.
        """
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "past_key_values": self._cache(self.input_ids.shape[1] - 1),
        }

    @cached_property
    def past_key_values(self) -> DynamicCache:
        """The cache of all tokens, for a loop of your own that goes on from ``logits``."""
        return self._cache(self.input_ids.shape[1])

    def _cache(self, columns: int) -> DynamicCache:
        cache = DynamicCache(config=self.config)
        fill(cache, self.keys, self.values, columns)
        return cache


def pack(
    model: Any,
    input_ids: Tensor | Sequence[Sequence[int] | Tensor],
    attention_mask: Tensor | None = None,
    *,
    row: int = ROW,
) -> Packed:
    """Prefill prompts of many lengths without computing their padding; the results are those of a padded batch.

    ``packed = tt.pack(model, prompts)``, then ``model.generate(**packed.inputs, max_new_tokens=64)``.

    Args:
        model: a decoder-only ``transformers`` model with sdpa or eager attention.
        input_ids: a list of prompts, or a padded batch ``(batch, tokens)``.
        attention_mask: of a padded batch, 1 for real tokens.
        row: tokens that go through the model at once, unless a prompt is longer: what bounds the memory.

    Raises:
        ThriftError: no prompts or an empty one, a mask that does not fit, or a model whose attention cannot be packed.
    """
    adapter = _packable(model)
    prompts = _prompts(input_ids, attention_mask, model.device)
    lengths = [len(p) for p in prompts]
    if not lengths or min(lengths) == 0:
        raise ThriftError("pack needs at least one prompt, and one token in each: leave out empty prompts")
    _check_row(row)
    longest = max(lengths)
    pad = model.generation_config.pad_token_id if model.generation_config is not None else None
    ids = prompts[0].new_full((len(prompts), longest), 0 if pad is None else pad)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = prompt
        mask[i, longest - len(prompt) :] = 1
    with torch.no_grad():
        logits, keys, values = prefill_rows(adapter, model, ids, mask, keep=1, row=row)
    return Packed(ids, mask, logits, sum(lengths), keys, values, model.config)


def prefill_rows(
    adapter: DecoderAdapter,
    forward: Any,
    ids: Tensor,
    mask: Tensor,
    *,
    positions: Tensor | None = None,
    keep: int,
    row: int = ROW,
    **kwargs: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits, and keys and values of each layer, of a left-padded batch; its padding is not computed.

    Args:
        adapter: of the model; ``forward`` what to call.
        ids, mask: ``(batch, tokens)``.
        positions: ``(batch, tokens)``; from 0 on in each row if None.
        keep: of how many of the last columns there are to be logits; 0 for all.
        row: tokens of a packed row, unless a prompt is longer.
        kwargs: passed on to the model.

    Returns:
        ``(batch, keep, vocabulary)`` and twice ``layers`` times ``(batch, kv_heads, tokens, head_dim)``, 0 in padding.
    """
    batch, width = ids.shape
    lengths: list[int] = mask.sum(1).tolist()
    keep = min(keep or width, width)
    store = _Store(batch, width, len(adapter.attentions), adapter.costs.windows)
    logits: Tensor | None = None
    for members in pack_bins(lengths, max(row, *lengths)):
        store.segments = [(i, lengths[i]) for i in members]
        tokens = torch.cat([ids[i, width - n :] for i, n in store.segments])
        places = torch.cat(
            [
                torch.arange(n, device=ids.device) if positions is None else positions[i, width - n :]
                for i, n in store.segments
            ]
        )
        kept = [min(n, keep) for _, n in store.segments]
        ends = torch.tensor([n for _, n in store.segments]).cumsum(0).tolist()
        wanted = torch.cat([torch.arange(end - k, end) for end, k in zip(ends, kept, strict=True)]).to(ids.device)
        with _packed_attention(adapter, store):
            out = forward(
                input_ids=tokens[None],
                position_ids=places[None],
                use_cache=False,
                logits_to_keep=wanted,
                return_dict=True,
                **kwargs,
            ).logits[0]
        if logits is None:
            logits = out.new_zeros(batch, keep, out.shape[-1])
        for (i, _), k, part in zip(store.segments, kept, out.split(kept), strict=True):
            logits[i, keep - k :] = part
    assert logits is not None
    return logits, store.keys, store.values


def fill(cache: DynamicCache, keys: list[Tensor], values: list[Tensor], columns: int) -> None:
    """Make an empty cache hold the first ``columns`` columns of every layer."""
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        if columns:
            cache.update(key[:, :, :columns], value[:, :, :columns], layer)


def _packable(model: Any) -> DecoderAdapter:
    """The adapter of a model whose prompts can be packed."""
    model = getattr(model, "_orig_mod", model)
    if not DecoderAdapter.fits(model):
        raise ThriftError(
            f"{type(model).__name__} cannot be packed: it is no decoder-only model whose attention dispatches through "
            "transformers' AttentionInterface"
        )
    adapter = DecoderAdapter(model)
    check_packable(adapter)
    return adapter


def check_packable(adapter: DecoderAdapter) -> None:
    """Raise ThriftError, with the reason, for a model whose attention cannot run prompt by prompt."""
    config, name = adapter.model.config.get_text_config(decoder=True), type(adapter.model).__name__
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other or len(adapter.attentions) != config.num_hidden_layers:
        what = ", ".join(sorted(other)) or "layers without attention"
        raise ThriftError(f"{name} cannot be packed: it has {what}; packing needs full or sliding attention")
    if "mrope_section" in str(getattr(config, "rope_parameters", None)):
        raise ThriftError(f"{name} cannot be packed: its tokens have several positions; use a text model")
    for module in adapter.attentions:
        used = str(module.config._attn_implementation).removeprefix(PREFIX)  # type: ignore[union-attr]
        if used not in BASES:
            raise ThriftError(
                f"attention implementation '{used}' cannot be packed; load the model with attn_implementation='sdpa'"
            )


def _check_row(row: int) -> None:
    if row < 1:
        raise ThriftError(f"row={row} holds no token: give the tokens that may go through the model at once, say {ROW}")


def _prompts(input_ids: Any, mask: Tensor | None, device: Any) -> list[Tensor]:
    """Each prompt's own tokens."""
    if isinstance(input_ids, Tensor):
        if input_ids.dim() != 2 or (mask is not None and mask.shape != input_ids.shape):
            raise ThriftError("pack takes input_ids (batch, tokens) and an attention_mask of the same shape")
        keep = torch.ones_like(input_ids) if mask is None else mask
        return [ids[real.bool()].to(device) for ids, real in zip(input_ids, keep, strict=True)]
    if mask is not None:
        raise ThriftError("a list of prompts has no padding: leave out attention_mask")
    return [torch.as_tensor(ids, dtype=torch.long, device=device) for ids in input_ids]


# ---- attention over packed prompts ----------------------------------------------------------------------------------


class _Store:
    """The row that is being computed, and keys and values so far.

    Attributes:
        segments: of the row's prompts, one behind the other, the batch row and the number of tokens.
    """

    def __init__(self, batch: int, width: int, layers: int, windows: Sequence[int | None]) -> None:
        self.batch, self.width, self.windows = batch, width, windows
        self.keys: list[Tensor] = [torch.empty(0)] * layers
        self.values: list[Tensor] = [torch.empty(0)] * layers
        self.segments: list[tuple[int, int]] = []
        self._masks: dict[tuple[int, int | None, torch.dtype], Tensor] = {}

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store ``(1, kv_heads, tokens, dim)`` of a row where the padded batch has them."""
        for held, new in ((self.keys, key), (self.values, value)):
            if not held[layer].numel():
                held[layer] = new.new_zeros(self.batch, new.shape[1], self.width, new.shape[-1])
            start = 0
            for i, n in self.segments:
                held[layer][i, :, self.width - n :] = new[0, :, start : start + n]
                start += n

    def mask(self, layer: int, n: int, eager: bool, like: Tensor) -> Tensor | None:
        """Of a prompt of ``n`` tokens in this layer; None where the attention function is causal by itself."""
        window = self.windows[layer] if layer < len(self.windows) else None
        window = window if window is not None and n > window else None
        if window is None and not eager:
            return None
        key = (n, window, like.dtype)
        if key not in self._masks:
            seen = torch.ones(n, n, dtype=torch.bool, device=like.device).tril()
            if window is not None:
                seen = seen.triu(1 - window)
            hidden = torch.zeros(n, n, dtype=like.dtype, device=like.device)
            self._masks[key] = hidden.masked_fill_(~seen, torch.finfo(like.dtype).min)[None, None]
        return self._masks[key]


_current: ContextVar[_Store] = ContextVar("packed prompts")


@contextmanager
def _packed_attention(adapter: DecoderAdapter, store: _Store) -> Iterator[None]:
    """While this is entered, attention runs on the prompts of ``store.segments`` one by one."""
    token = _current.set(store)
    try:
        with answered_by("prompts", adapter.attentions, _attention_over):
            yield
    finally:
        _current.reset(token)


def _attention_over(base: str) -> Any:
    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        store, layer = _current.get(), int(module.layer_idx)
        store.put(layer, key, value)
        default: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        run = ALL_ATTENTION_FUNCTIONS.get_interface(base, default)
        parts, start = [], 0
        for _, n in store.segments:
            span = slice(start, start + n)
            mask = store.mask(layer, n, base == "eager", query)
            parts.append(run(module, query[:, :, span], key[:, :, span], value[:, :, span], mask, **kwargs)[0])
            start += n
        return torch.cat(parts, dim=1), None

    return attention
