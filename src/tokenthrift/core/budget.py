"""Budget: how many tokens to keep. Schedule: how a budget is spread over layers, heads, crops or frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ThriftError


@dataclass(frozen=True)
class Budget:
    """Keep a share of the tokens (``ratio``, in (0, 1]) or a fixed number of them (``count``, at least 1).

    ``Budget.of(0.25)`` is a ratio, ``Budget.of(512)`` a count: a float is a ratio, an int is a count.
    """

    ratio: float | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.count is None):
            raise ThriftError("a budget is either a ratio (a float in (0, 1]) or a count (an int of at least 1)")
        for value in (self.ratio, self.count):
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise ThriftError(f"{value!r} is not a budget; give a ratio such as 0.25 or a count such as 512")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ThriftError(f"keep ratio {self.ratio} is outside (0, 1]; 0.25 keeps a quarter of the tokens, 1.0 all")
        if self.count is not None and not (isinstance(self.count, int) and self.count >= 1):
            raise ThriftError(f"budget {self.count} keeps nothing; give a count of at least 1, or a ratio in (0, 1]")

    @classmethod
    def of(cls, value: Budget | float | int) -> Budget:
        """From a float (ratio) or an int (count); budgets pass through."""
        if isinstance(value, Budget):
            return value
        return cls(count=value) if isinstance(value, int) else cls(ratio=value)

    def tokens(self, n: int) -> int:
        """How many of ``n`` tokens to keep: never more than ``n``, at least 1 if there is one; ratios round half up."""
        wanted = self.count if self.count is not None else math.floor(n * (self.ratio or 0) + 0.5)
        return max(min(wanted, n), min(n, 1))

    def tokens_of(self, lengths: Tensor) -> Tensor:
        """The same for a batch of lengths: ``(batch,)`` int64 to ``(batch,)`` int64."""
        kept = [self.tokens(int(n)) for n in lengths.flatten().tolist()]
        return torch.tensor(kept, dtype=torch.int64, device=lengths.device).reshape(lengths.shape)

    def __str__(self) -> str:
        return str(self.ratio if self.ratio is not None else self.count)


def share_out(total: int, weights: Sequence[float], caps: Sequence[int] | None = None, floor: int = 0) -> list[int]:
    """Split ``total`` into integers in proportion to ``weights``: exact sum, at least ``floor``, at most ``caps`` each.

    Largest-remainder rounding of the proportional shares; what a floor or a cap takes or leaves is shared out among the
    others. When the caps (or the floors) make the sum impossible, it comes as close as they allow.
    """
    if not all(0 <= w < math.inf for w in weights):
        raise ThriftError("weights to share by must be finite and at least 0")
    high = [total] * len(weights) if caps is None else list(caps)
    low = [min(floor, cap) for cap in high]
    ideal = [0.0] * len(weights)
    free, left = list(range(len(weights))), total
    while free:
        mass = sum(weights[i] for i in free)
        for i in free:
            ideal[i] = left * (weights[i] / mass) if mass > 0 else left / len(free)
        # Too much in all when clipped to the bounds: the floors hold for good. Too little: the caps do.
        excess = sum(min(max(ideal[i], low[i]), high[i]) - ideal[i] for i in free)
        bound = low if excess > 0 else high
        held = {i for i in free if (ideal[i] < low[i] if excess > 0 else ideal[i] > high[i])}
        if not held:
            break
        for i in held:
            ideal[i] = bound[i]
            left -= bound[i]
        free = [i for i in free if i not in held]
    parts = [math.floor(x) for x in ideal]
    room = [i for i in range(len(parts)) if parts[i] < high[i]]
    by_remainder = sorted(room, key=lambda i: round(parts[i] - ideal[i], 9))  # equal remainders: the earlier unit
    for i in by_remainder[: max(total - sum(parts), 0)]:
        parts[i] += 1
    return parts


@dataclass(frozen=True)
class Schedule:
    """How a mean budget per unit is spread over ``n`` units (layers, heads, crops, frames); the total is kept.

    ``Schedule.constant()``, ``Schedule.linear(slope)``, ``Schedule.pyramid(beta)``, ``Schedule.listed([...])``.
    """

    weights: tuple[float, ...] | None = None
    slope: float = 0.0

    @classmethod
    def constant(cls) -> Schedule:
        """Every unit gets the same."""
        return cls()

    @classmethod
    def linear(cls, slope: float) -> Schedule:
        """From ``(1 - slope)`` to ``(1 + slope)`` times the mean; a slope of -1 falls from twice the mean to 0."""
        if not -1 <= slope <= 1:
            raise ThriftError(f"schedule slope {slope} is outside [-1, 1]")
        return cls(slope=slope)

    @classmethod
    def pyramid(cls, beta: float) -> Schedule:
        """Falls linearly so that the last unit gets ``1/beta`` of the mean (PyramidKV, arXiv 2406.02069)."""
        if not 1 <= beta < math.inf:
            raise ThriftError(
                f"pyramid beta {beta} is outside [1, inf); 20 is the paper's value, 1 is a constant schedule"
            )
        return cls(slope=1 / beta - 1)

    @classmethod
    def listed(cls, weights: Sequence[float]) -> Schedule:
        """Relative weights, one a unit; a shorter list is padded with zeros, as ToMe's schedules are."""
        if not all(0 <= w < math.inf for w in weights) or not any(weights):
            raise ThriftError("a listed schedule needs finite weights of at least 0, not all 0")
        return cls(weights=tuple(weights))

    def spread(self, mean: float, n: int, cap: int | None = None, floor: int = 0) -> list[int]:
        """Budgets of the ``n`` units: integers that sum to ``round(mean * n)`` where caps and floors allow."""
        total = math.floor(mean * n + 0.5)
        return share_out(total, self._weights(n), None if cap is None else [cap] * n, floor)

    def _weights(self, n: int) -> list[float]:
        if self.weights is not None:
            return (list(self.weights) + [0.0] * n)[:n]
        return [1 + self.slope * ((2 * i / (n - 1) - 1) if n > 1 else 0) for i in range(n)]


def top_p_counts(scores: Tensor, p: float) -> Tensor:
    """Smallest counts whose top scores hold a share ``p`` of the mass: ``(*, tokens)`` to ``(*)``; 1 keeps all."""
    if not 0 < p <= 1:
        raise ThriftError(f"top-p {p} is outside (0, 1]")
    if p == 1:  # a long sum rounds, and would cut off the tail
        return torch.full(scores.shape[:-1], scores.shape[-1], device=scores.device)
    ordered = scores.to(torch.float32).sort(dim=-1, descending=True).values
    mass = ordered.cumsum(-1)
    enough = (mass < p * mass[..., -1:]).sum(-1) + 1
    return enough.clamp(max=scores.shape[-1])
