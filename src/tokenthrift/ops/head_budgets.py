"""Budgets of heads, from how much of its attention each holds with a share of the tokens."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..core.budget import share_out

Figures = tuple[tuple[float, ...], ...]
"""For every head what it holds with none of the tokens, with ``1 / steps`` of them, …, and with all."""


@lru_cache(maxsize=64)
def budgets_for_mass(held: Figures, n: int, mass: float, floor: int) -> list[int]:
    """How many of ``n`` tokens each head keeps to hold ``mass`` of its attention, at least ``floor``; 1 keeps all."""
    if mass == 1:
        return [n] * len(held)
    needed = needed_shares(torch.tensor(held, dtype=torch.float64), mass).tolist()
    return [min(max(math.ceil(share * n - 1e-6), floor), n) for share in needed]


@lru_cache(maxsize=64)
def budgets_for_mean(held: Figures, n: int, mean: int, floor: int) -> list[int]:
    """The same for the mass with which heads keep ``mean`` tokens on average; the sum is exact."""
    figures = torch.tensor(held, dtype=torch.float64)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if float(needed_shares(figures, middle).mean()) * n <= mean else (low, middle)
    weights = needed_shares(figures, low).tolist()
    return share_out(mean * len(held), weights, [n] * len(held), min(floor, mean))


def needed_shares(held: Tensor, mass: float) -> Tensor:
    """The least share of the tokens with which each head holds ``mass``: ``(heads, steps + 1)`` to ``(heads,)``.

    Between the steps the figures are joined by lines.
    """
    step = (held < mass).sum(-1, keepdim=True).clamp(max=held.shape[-1] - 1)
    before = (step - 1).clamp(min=0)
    below, above = held.gather(-1, before), held.gather(-1, step)
    part = ((mass - below) / (above - below).clamp(min=1e-9)).clamp(0, 1)
    return ((before + part * (step - before)) / (held.shape[-1] - 1)).squeeze(-1)
