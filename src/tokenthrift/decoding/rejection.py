"""Draw a token that a constraint accepts, asking about few tokens, with an unbiased estimate of what the constraint
leaves of the law: adaptive weighted rejection sampling (arXiv 2504.05410)."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, inf, log
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import ThriftError

ALGORITHMS = ("auto", "recursive", "geometric", "improper")
_IMPOSSIBLE = -700.0
_TINY = 1e-18
"""The smallest chance that numpy draws waiting times for."""


class Choice(NamedTuple):
    """A token, the log of its weight (-inf: nothing was accepted), and how many questions were asked."""

    token: int
    log_weight: float
    checks: int


def draw(
    logp: Any,
    accept: Callable[[int], bool],
    rng: np.random.Generator,
    algorithm: str = "auto",
    max_accepts: int = 2,
    max_rejects: float = inf,
) -> Choice:
    """A token with the law ``p(token | accepted)``, whose weight has the mean ``p(accepted)``.

    Args:
        logp: ``(vocabulary,)`` log probabilities, normalised; float64. -inf where a token cannot come.
        accept: whether a token may come next; asked again about a token only by ``geometric``.
        rng: all randomness.
        algorithm: ``"recursive"``, ``"geometric"``, ``"improper"`` (weight 1, the fewest questions), or ``"auto"``,
            which is recursive unless more than two accepts are asked for, or a token has two thirds of the mass.
        max_accepts: questions answered with yes after which geometric stops; more give a steadier weight.
        max_rejects: questions answered with no after which to give up; finite numbers lose rare tokens.

    Raises:
        ThriftError: an unknown algorithm, or a law without any possible token.
    """
    logp = possible(logp)
    if algorithm == "auto":
        algorithm = "recursive" if max_accepts == 2 and exp(logp.max()) < 2 / 3 else "geometric"
    if algorithm == "recursive":
        return recursive(logp, accept, rng, max_rejects)
    if algorithm == "geometric":
        return geometric(logp, accept, rng, max_accepts, max_rejects)
    if algorithm == "improper":
        return improper(logp, accept, rng, max_rejects)
    raise ThriftError(f"a constraint is sampled by one of {', '.join(ALGORITHMS)}, not by '{algorithm}'")


def possible(logp: Any) -> np.ndarray:
    """The law as float64, with -inf for what a double cannot hold as a probability. Raises ThriftError if nothing is
    left, or something is no number."""
    logp = np.asarray(logp, dtype=np.float64)
    logp = np.where(logp < _IMPOSSIBLE, -inf, logp)
    if np.isnan(logp).any() or not (logp > -inf).any():
        raise ThriftError("the model gives no token a probability: look at its logits and at the logits processors")
    return logp


def recursive(
    logp: np.ndarray, accept: Callable[[int], bool], rng: np.random.Generator, max_rejects: float = inf
) -> Choice:
    """Draw without replacement until one is accepted; one more draw estimates the accepted mass.

    With r the mass that is not rejected by then and q the token's share of it, ``r (q + (1 - q) E)`` is accepted, where
    E, the accepted share of the rest, is estimated by 1 or 0 as the next draw is accepted or not: the weight is r if it
    is, and ``r q``, the token's own probability, if not.
    """
    order, left = _order(logp, rng)
    for i, token in enumerate(order):
        if accept(token):
            if i + 1 == len(order) or i >= max_rejects:
                return Choice(token, log(left[i]), i + 1)
            return Choice(token, log(left[i]) if accept(order[i + 1]) else float(logp[token]), i + 2)
        if i + 1 >= max_rejects:
            return Choice(token, -inf, i + 1)
    return Choice(order[-1], -inf, len(order))


def geometric(
    logp: np.ndarray,
    accept: Callable[[int], bool],
    rng: np.random.Generator,
    max_accepts: int = 2,
    max_rejects: float = inf,
) -> Choice:
    """Plain rejection sampling until ``max_accepts`` draws were accepted, of which the first is the token.

    Tokens that were rejected are not drawn again: how often they would have been is drawn instead, from a geometric
    law. The weight is the unbiased estimate ``(accepts - 1) / (draws - 1)``.
    """
    logp = logp.copy()
    token, accepts, rejects, checks, rejected = -1, 0, 0.0, 0, False
    while accepts < max_accepts and rejects < max_rejects:
        order, left = _order(logp, rng)
        for candidate, mass in zip(order, left, strict=True):
            if rejected:
                rejects += int(rng.geometric(min(max(mass, _TINY), 1.0))) - 1
            if rejects >= max_rejects:
                break
            checks += 1
            if accept(candidate):
                token = token if accepts else candidate
                accepts += 1
                break
            rejects, rejected = rejects + 1, True
            logp[candidate] = -inf
        else:
            return Choice(order[-1], -inf, checks)  # nothing is left
    if not accepts:
        return Choice(order[0], -inf, checks)
    hits, draws = min(max_accepts - 1, accepts), accepts + min(rejects, max_rejects) - 1
    return Choice(token, log(hits / draws) if draws else 0.0, checks)


def improper(
    logp: np.ndarray, accept: Callable[[int], bool], rng: np.random.Generator, max_rejects: float = inf
) -> Choice:
    """Draw without replacement until one is accepted. The weight is 1: what locally constrained decoding does."""
    return _first(_order(logp, rng)[0], accept, max_rejects)


def likeliest(logp: np.ndarray, accept: Callable[[int], bool]) -> Choice:
    """The likeliest token that is accepted: what greedy decoding under a mask takes. The weight is 1."""
    order = np.argsort(-logp, kind="stable")
    return _first(order[: int((logp > -inf).sum())].tolist(), accept, inf)


def _first(order: list[int], accept: Callable[[int], bool], max_rejects: float) -> Choice:
    for i, token in enumerate(order):
        if accept(token):
            return Choice(token, 0.0, i + 1)
        if i + 1 >= max_rejects:
            break
    return Choice(order[-1], -inf, i + 1)


def _order(logp: np.ndarray, rng: np.random.Generator) -> tuple[list[int], list[float]]:
    """Possible tokens in the order of drawing without replacement, by Gumbel keys; and the mass of each with all after
    it, summed from the end, which is accurate also where next to nothing is left."""
    order = np.argsort(-(logp - np.log(-np.log(rng.random(len(logp))))))[: int((logp > -inf).sum())]
    left = np.exp(logp[order])[::-1].cumsum()[::-1]
    return order.tolist(), left.tolist()
