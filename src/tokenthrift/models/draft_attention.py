"""What a draft model attends to in a prompt, and in the tokens that it writes after it."""

from __future__ import annotations

from collections.abc import Callable
from os import fspath
from typing import Any

import torch
from torch import Tensor

from ..core.costs import DecoderCosts
from ..core.errors import ThriftError
from ..ops.attention import attention_rows
from .attention import Watcher, watching_instead
from .decoder import context_length, find_attentions
from .drafts import Given, load_draft
from .replacing import plain_forward
from .vocabularies import check_vocabulary, size_of


def draft_for(model: Any, target: Any, method: str, tokenizer: Any = None) -> Any:
    """A draft model that a method was given, loaded where the target is; ``tokenizer`` is the target's, if known.

    Raises:
        ThriftError: it is no decoder with attention layers, or has another vocabulary.
    """
    own = None
    if isinstance(model, Given):
        draft = model.model
    else:
        draft, own = load_draft(fspath(model), str(target.device), target.dtype)
    if draft is target:
        raise ThriftError(f"{method} needs a draft model beside the target; prefill=gemfilter() uses the target itself")
    if not find_attentions(draft):
        raise ThriftError(f"{type(draft).__name__} cannot draft for {method}: choose a decoder-only language model")
    check_vocabulary(method, target, draft, tokenizer, own)
    return draft


@torch.no_grad()
def draft_attention(
    draft: Any,
    ids: Tensor,
    real: Tensor,
    rows: int,
    steps: int,
    first_layer: int,
    reduce: Callable[[Tensor], Tensor],
) -> list[list[Tensor]]:
    """Of every step and every layer from ``first_layer`` on, what ``reduce`` makes of the attention.

    The first step reads the prompt, and has the attention ``(batch, heads, rows, tokens)`` of its last queries; each
    other one writes a token, greedily, and has this token's attention. No layer's attention outlives its layer. Layers
    with a sliding window are left out.

    Args:
        ids: ``(batch, tokens)`` of a left-padded batch.
        real: ``(batch, tokens)`` bool.

    Raises:
        ThriftError: a prompt that is longer than the draft model's context, tokens that it does not have, or too few
            layers.
    """
    attentions = find_attentions(draft)
    if first_layer >= len(attentions):
        raise ThriftError(f"first_layer={first_layer}: the draft model has {len(attentions)} layers")
    windows = DecoderCosts.of(draft).windows or (None,) * len(attentions)
    full = [m for m, window in zip(attentions, windows, strict=True) if window is None]
    asked = [m for m in full if attentions.index(m) >= first_layer]
    if not asked:
        raise ThriftError("all these layers of the draft model have a sliding window: choose one with full attention")
    room = context_length(draft)
    if room is not None and int(real.sum(1).max()) > room:
        raise ThriftError(f"the prompt has {int(real.sum(1).max()):,} tokens, the draft model's context is {room:,}")
    if int(ids.max()) >= size_of(draft):
        raise ThriftError("the prompt has tokens that the draft model does not know: choose one of the same tokenizer")
    found: list[list[Tensor]] = []
    mask, positions, cache = real.long(), (real.long().cumsum(1) - 1).clamp(min=0), None
    ids = ids.to(draft.device)

    def note(query: Tensor, key: Tensor, scaling: float) -> None:
        seen = mask.bool().to(key.device)
        found[-1].append(reduce(attention_rows(query[:, :, -rows:], key, scaling, seen)).to(real.device))

    # Past the hooks and watchers of a session on this model, which would count what only scores.
    forward = plain_forward(draft)
    with watching_instead(asked, lambda module: _Note(note)):
        for step in range(steps):
            found.append([])
            out = forward(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=steps > 1,
                logits_to_keep=1,
            )
            if step + 1 < steps:
                cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
                mask, positions = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), positions[:, -1:] + 1
    return found


class _Note(Watcher):
    """Shows a function the queries and keys of attention calls."""

    def __init__(self, note: Callable[[Tensor, Tensor, float], None]) -> None:
        self.note = note

    def after(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> None:
        self.note(query, key, scaling)
