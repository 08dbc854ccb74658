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

    def following(self, steps: int, mask: Tensor) -> Rotary:
        """The rotations of the ``steps`` positions that follow each row's last real token.

        One step turns by the angle between a row's first two real tokens, so the model need not be asked.

        Args:
            steps: how many positions.
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
        return Rotary(size * to_come.cos(), size * to_come.sin(), self.turn)

    def ahead(self, steps: int, mask: Tensor) -> Rotary:
        """The mean of :meth:`following`: one rotation for all."""
        each = self.following(steps, mask)
        return Rotary(each.cos.mean(1, keepdim=True), each.sin.mean(1, keepdim=True), self.turn)

    def first(self, tokens: int) -> Rotary:
        """The rotations of the first so many tokens."""
        return Rotary(self.cos[:, :tokens], self.sin[:, :tokens], self.turn)

    def last(self, tokens: int) -> Rotary:
        """The rotations of the last so many tokens."""
        return Rotary(self.cos[:, -tokens:], self.sin[:, -tokens:], self.turn)

    def then(self, more: Rotary) -> Rotary:
        """The rotations of these tokens and of more that follow them."""
        batch = max(len(self.cos), len(more.cos))
        cos, sin = (
            torch.cat([a.expand(batch, -1, -1), b.to(a.dtype).expand(batch, -1, -1)], dim=1)
            for a, b in ((self.cos, more.cos), (self.sin, more.sin))
        )
        return Rotary(cos, sin, self.turn)

    def repeated(self, times: int) -> Rotary:
        """The same for a batch in which each row stands so many times, one behind the other."""
        if len(self.cos) == 1:
            return self
        return Rotary(self.cos.repeat_interleave(times, dim=0), self.sin.repeat_interleave(times, dim=0), self.turn)

    def at(self, index: Tensor) -> Rotary:
        """The rotations of the tokens at ``index`` ``(batch, m)``, row by row."""
        batch, dim = index.shape[0], self.cos.shape[-1]
        wide = index.unsqueeze(-1).expand(-1, -1, dim)
        cos, sin = (t.expand(batch, -1, -1).gather(1, wide) for t in (self.cos, self.sin))
        return Rotary(cos, sin, self.turn)
