"""Counts a decoder's forwards and their analytic FLOPs, with the plan and as they would be without it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ..core.session import Session
from .attention import cache_among

if TYPE_CHECKING:
    from .decoder import DecoderAdapter


def install_counter(adapter: DecoderAdapter, session: Session, undo: ExitStack) -> None:
    """Hook the model's forward until ``undo`` closes; adds each call to ``session.flops`` and ``flops_dense``."""
    costs = adapter.costs
    nothing = [(0, 0)] * costs.layers
    windows = costs.windows or (None,) * costs.layers
    held = nothing

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note, per layer, the entries in the cache and those that a full cache would hold."""
        nonlocal held
        cache = cache_among(args, kwargs)
        held = [_entries(layer) for layer in cache.layers] if cache is not None else nothing
        if len(held) != costs.layers:  # a cache whose layers are made at their first use
            held = nothing

    def after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tokens = next(
            v for k in ("input_ids", "inputs_embeds") if (v := kwargs.get(k, args[0] if args else None)) is not None
        )
        batch, new = tokens.shape[:2]
        shown = (output.logits if hasattr(output, "logits") else output[0]).shape[1]
        session.count_forward(
            batch * costs.flops(new, [stored + new for stored, _ in held], shown),
            batch
            * costs.flops(new, [_within(w, seen) + new for w, (_, seen) in zip(windows, held, strict=True)], shown),
        )

    undo.callback(adapter.model.register_forward_pre_hook(before, with_kwargs=True).remove)
    undo.callback(adapter.model.register_forward_hook(after, with_kwargs=True).remove)


def _within(window: int | None, tokens: int) -> int:
    """How many of them a full cache holds: the last place of a window is the next query's."""
    return tokens if window is None else min(tokens, window - 1)


def _entries(layer: Any) -> tuple[int, int]:
    """How many entries a cache layer has, and how many tokens it has seen."""
    if not getattr(layer, "is_initialized", False):  # also convolutions and recurrent states, which have no entries
        return (0, 0)
    return (layer.get_mask_sizes(0)[0], layer.get_seq_length())
