"""Counts a decoder's forwards and their analytic FLOPs, with the plan and as they would be without it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache

from ..core.session import Session

if TYPE_CHECKING:
    from .decoder import DecoderAdapter


def install_counter(adapter: DecoderAdapter, session: Session, undo: ExitStack) -> None:
    """Hook the model's forward until ``undo`` closes; adds each call to ``session.flops`` and ``flops_dense``."""
    costs = adapter.costs
    keys_before: dict[str, list[tuple[int, int]]] = {}

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = next((v for v in (*args, *kwargs.values()) if isinstance(v, Cache)), None)
        # Per layer: entries that this forward attends to beside its own tokens, and those that a full cache would hold.
        held = [] if cache is None else [(sizes[0], layer.get_seq_length()) for layer, sizes in _layers(cache)]
        keys_before["held"] = held if len(held) == costs.layers else [(0, 0)] * costs.layers

    def after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tokens = next(
            v for k in ("input_ids", "inputs_embeds") if (v := kwargs.get(k, args[0] if args else None)) is not None
        )
        batch, new = tokens.shape[:2]
        logits = output.logits if hasattr(output, "logits") else output[0]
        held = keys_before.pop("held", [(0, 0)] * costs.layers)
        session.count_forward(
            batch * costs.flops(new, [stored + new for stored, _ in held], logits.shape[1]),
            batch * costs.flops(new, [seen + new for _, seen in held], logits.shape[1]),
        )

    undo.callback(adapter.model.register_forward_pre_hook(before, with_kwargs=True).remove)
    undo.callback(adapter.model.register_forward_hook(after, with_kwargs=True).remove)


def _layers(cache: Cache) -> list[tuple[Any, tuple[int, int]]]:
    """Layers of a cache with their ``(entries, offset)``; empty layers hold nothing yet."""
    return [(layer, layer.get_mask_sizes(0) if layer.is_initialized else (0, 0)) for layer in cache.layers]
