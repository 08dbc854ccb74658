"""Fidelity of next-token distributions, and intervals by bootstrap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def kl_divergence(full: Tensor, reduced: Tensor) -> float:
    """Mean over positions of KL(full || reduced) in nats; both are ``(positions, vocabulary)`` logits."""
    p = full.to(torch.float32).log_softmax(-1)
    q = reduced.to(torch.float32).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean().clamp(min=0))


def top1_agreement(full: Tensor, reduced: Tensor) -> float:
    """Share of positions whose most likely token is the same."""
    return float((full.argmax(-1) == reduced.argmax(-1)).to(torch.float32).mean())


def nats_per_token(logits: Tensor, tokens: Tensor) -> float:
    """Mean negative log-likelihood of ``tokens`` ``(positions,)`` under ``logits`` ``(positions, vocabulary)``."""
    return float(torch.nn.functional.cross_entropy(logits.to(torch.float32), tokens))


def hits(logits: Tensor, tokens: Tensor) -> float:
    """Share of ``tokens`` that are the most likely ones; 1.0 is what greedy decoding would have written verbatim."""
    return float((logits.argmax(-1) == tokens).to(torch.float32).mean())


def probability(logits: Tensor, tokens: Tensor) -> float:
    """Geometric mean of the probabilities of ``tokens`` ``(positions,)``: 1.0 for a model that is sure of them."""
    return math.exp(-nats_per_token(logits, tokens))


def recall(text: str, expected: Sequence[str]) -> float:
    """Share of the expected strings that the text has, in either case."""
    return sum(string.lower() in text.lower() for string in expected) / len(expected)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> float:
    """Length of the common prefix as a share of the longer sequence; 1.0 for identical ones."""
    longest = max(len(a), len(b))
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return same / longest if longest else 1.0


def bootstrap(
    strata: Mapping[str, Sequence[float]], seed: int = 0, draws: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean over strata of the strata's means, with its percentile bootstrap interval: ``(mean, low, high)``.

    A stratum is a task, its values are one number a case (cases are the independent units: questions about one document
    are not). Cases are drawn with replacement inside each task. With one stratum this is the plain bootstrap of a mean.
    """
    rng = np.random.default_rng(seed)
    groups = [np.asarray(values, dtype=float) for values in strata.values() if len(values)]
    if not groups:
        return float("nan"), float("nan"), float("nan")
    means = np.mean([g[rng.integers(0, len(g), (draws, len(g)))].mean(1) for g in groups], axis=0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(np.mean([g.mean() for g in groups])), float(low), float(high)


def share_interval(
    right: ArrayLike, asked: ArrayLike, seed: int = 0, draws: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``sum(right) / sum(asked)``, one number each a case.

    Cases are drawn with replacement, not single questions: those about one case are not independent.
    """
    sums, counts = np.asarray(right, dtype=float), np.asarray(asked, dtype=float)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
