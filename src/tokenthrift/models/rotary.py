"""How an attention layer rotated its queries and keys: its embeddings, with its own file's way of applying them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ThriftError
from ..ops.rotary import Rotary


def rotary_of(module: nn.Module, embeddings: Any) -> Rotary:
    """The rotation of one forward.

    Args:
        module: the attention layer.
        embeddings: the ``position_embeddings`` that it was called with.

    Raises:
        ThriftError: it got none, or applies them in a way that is not known here.
    """
    turn = _turn_of(module)
    pair = isinstance(embeddings, tuple) and len(embeddings) == 2 and all(t.dim() == 3 for t in embeddings)
    if turn is None or not pair or hasattr(module, "qk_rope_head_dim"):  # MLA rotates the tail of a head only
        raise ThriftError(
            f"layer {module.layer_idx} ({type(module).__name__}) has no rotary position embeddings that can be undone; "
            "use a cache method that does not need them, such as snapkv"
        )
    cos, sin = embeddings
    if not getattr(module, "use_rope", True):  # given the embeddings, but without positions by design
        cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
    return Rotary(cos, sin, turn)


def _turn_of(module: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """The function with which the module's file applies cos and sin: it knows how channels pair up."""
    apply: Any = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    names = list(inspect.signature(apply).parameters) if apply is not None else []
    if names[:4] == ["q", "k", "cos", "sin"]:
        return lambda x, cos, sin: apply(x, x, cos, sin)[0]
    return apply if names[:3] == ["x", "cos", "sin"] else None
