"""How important tokens are, by the attention that they receive."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.view import View

BLOCK = 64
"""Query rows that are computed at once, so that no tokens × tokens matrix is held."""


def importance(view: View) -> Tensor:
    """Attention of the first token of the prefix (CLS) to every token, mean over heads: ``(batch, tokens)`` float32.

    Where there is nobody to ask, the mean over all queries takes its place: in encoders without a prefix (SigLIP), and
    where the first token sees only itself (texts read causally). The view keeps the result as its part ``importance``,
    so that a method's ``combine`` computes nothing again.
    """
    if "importance" not in view:
        scores = None
        if view.prefix:
            scores = view.attention(slice(0, 1)).to(torch.float32).mean((1, 2))
            if not bool(scores[:, view.prefix :].any()):
                scores = None
        view.offer("importance", attention_received(view) / view.features.shape[1] if scores is None else scores)
    result: Tensor = view.importance
    return result


def attention_received(view: View, at_once: int = 0) -> Tensor:
    """Attention that each token receives from all tokens, mean over heads: ``(batch, tokens)`` float32.

    The matrix of up to ``at_once`` tokens is asked for as a whole: pays where the layer uses it again.
    """
    tokens = view.features.shape[1]
    if tokens <= at_once:
        whole: Tensor = view.attention(slice(None)).to(torch.float32)
        return whole.sum(2).mean(1)
    received = torch.zeros(view.features.shape[:2], device=view.features.device)
    for start in range(0, tokens, BLOCK):
        rows = view.attention(slice(start, min(start + BLOCK, tokens)))
        received += rows.to(torch.float32).sum(2).mean(1)
    return received
