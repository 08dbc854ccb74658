"""Rotary position embeddings: undone, and extrapolated to positions that are yet to come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """A rotation of queries or keys by their positions, in whatever layout the model pairs its channels.

    Attributes:
        cos, sin: ``(batch or 1, tokens, dim)``; ``tokens`` is 1 for one rotation of all.
        turn: ``(x, cos, sin)`` to ``x`` rotated, linear in ``x`` ``(batch, heads, tokens, head_dim)`` and in
            ``(cos, sin)``: a rotation by mean cos and sin is the mean of the rotations.
    """

    cos: Tensor
    sin: Tensor
    turn: Callable[[Tensor, Tensor, Tensor], Tensor]

    def apply(self, x: Tensor) -> Tensor:
        """Rotate ``(batch, heads, tokens, head_dim)``."""
        return self.turn(x, self.cos.to(x.dtype), self.sin.to(x.dtype))

    def undo(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`apply`."""
        size = self.cos.square() + self.sin.square()  # not 1 where long-context variants scale the embeddings
        return self.turn(x, (self.cos / size).to(x.dtype), (-self.sin / size).to(x.dtype))

    def ahead(self, steps: int, mask: Tensor) -> Rotary:
        """The mean rotation over the ``steps`` positions that follow each row's last real token.

        One step turns by the angle between a row's first two real tokens, so the model need not be asked.

        Args:
            steps: how many positions to average over.
            mask: ``(batch, tokens)`` bool, true for real tokens.
        """
        batch, n = mask.shape
        cos, sin = (t.to(torch.float32).expand(batch, n, -1) for t in (self.cos, self.sin))
        angle, row = torch.atan2(sin, cos), torch.arange(batch, device=mask.device)
        first = mask.int().argmax(-1)
        last = n - 1 - mask.flip(-1).int().argmax(-1)
        step = angle[row, (first + 1).clamp(max=n - 1)] - angle[row, first]
        count = torch.arange(1, steps + 1, device=mask.device)[:, None]
        to_come = angle[row, last].unsqueeze(1) + step.unsqueeze(1) * count  # (batch, steps, dim)
        size = torch.hypot(sin, cos)[row, last].unsqueeze(1)
        return Rotary(size * to_come.cos().mean(1, keepdim=True), size * to_come.sin().mean(1, keepdim=True), self.turn)
