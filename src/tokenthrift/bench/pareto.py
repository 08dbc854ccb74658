"""Which plans no other plan beats, and which one to recommend."""

from __future__ import annotations

from collections.abc import Sequence


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """True if ``a`` is nowhere worse than ``b`` and somewhere better; lower is better everywhere."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points that no other point dominates, in the order given; equal points all stay."""
    return [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)]


def recommend(losses: Sequence[float], costs: Sequence[float], max_loss: float) -> int | None:
    """Index of the cheapest plan whose quality loss is at most ``max_loss``; ties go to the smaller loss."""
    fit = [i for i, loss in enumerate(losses) if loss <= max_loss]
    return min(fit, key=lambda i: (costs[i], losses[i])) if fit else None
