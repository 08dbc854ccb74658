"""Counts what a vision-language model computes before its language model: encoder and projector, as they run."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.session import Session
from .encoder import find_encoder

if TYPE_CHECKING:
    from .multimodal import MultimodalAdapter

_PROJECTION = "mm_input_projection_weight"
"""Where Gemma 3's connector multiplies by a matrix that is no module of its own."""


def install_visual_counter(adapter: MultimodalAdapter, session: Session, undo: ExitStack) -> None:
    """Add linear layers, convolutions and attention outside the language model to the session's FLOPs until ``undo``
    closes.

    They cost as much with the plan as without it. A plan with a vision stage counts the encoder's layers itself, as it
    knows both; what it takes from a projector is added where that is known (``Features``).
    """
    known = {*adapter.language.modules(), adapter.model.get_output_embeddings()}
    if "vision" in session.plan.stages and (found := find_encoder(adapter.encoder)) is not None:
        known.update(found[0].modules())
    pairs: Any = WeakTensorKeyDictionary()  # of borders between sequences, which many layers share

    def count(flops: int) -> None:
        session.flops += flops
        session.flops_dense += flops

    def product(module: Any, args: Any, out: Tensor) -> None:
        weight: Tensor = getattr(module, "weight" if hasattr(module, "weight") else _PROJECTION)
        channels = 1 if isinstance(module, nn.Conv2d | nn.Conv3d) else -1
        count(2 * weight.numel() * (out.numel() // out.shape[channels]))

    def attention(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        borders = kwargs.get("cu_seqlens")
        if borders is None:
            seen = hidden.shape[0] * hidden.shape[1] ** 2
        else:
            if borders not in pairs:
                pairs[borders] = int(borders.diff().square().sum())
            seen = pairs[borders]
        count(4 * seen * hidden.shape[-1])

    for module in adapter.inner.modules():
        if module in known:
            continue
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) or hasattr(module, _PROJECTION):
            undo.callback(module.register_forward_hook(product).remove)
        elif hasattr(module, "is_causal") and hasattr(module, "config"):
            undo.callback(module.register_forward_pre_hook(attention, with_kwargs=True).remove)
