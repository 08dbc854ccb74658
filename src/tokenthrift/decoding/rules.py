"""Rules: which token stands after a node of the draft, given the model's distribution there.

A rule is exact if the token that it returns has the model's own law, whatever the draft was, as long as the draft's
laws in :class:`~tokenthrift.core.draft.Drawn` are true.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core.draft import Drawn
from ..core.errors import ThriftError, did_you_mean

Rule = Callable[[Tensor, Sequence[int], Drawn | None], int]
"""From the model's law ``(vocabulary,)``, the tokens guessed, and what they were drawn from, to a token. A token that
was guessed means that the guess is accepted."""


def sample(p: Tensor, guesses: Sequence[int], drawn: Drawn | None) -> int:
    """Draw from the model's law and see whether it was guessed: exact for every draft, drawn or not.

    A guess ``x`` is accepted with probability ``p(x)``: the best there is for guesses that were not drawn, and less
    than :func:`reject` and :func:`k_seq` accept of those that were.
    """
    return int(torch.multinomial(p, 1))


def reject(p: Tensor, guesses: Sequence[int], drawn: Drawn | None) -> int:
    """Recursive rejection sampling over guesses drawn *without* replacement; exact.

    One guess: speculative sampling (Leviathan et al., arXiv 2211.17192). Several: Recursive Speculative Decoding
    (arXiv 2402.14160). Each guess is accepted with ``min(1, p/q)``; after a rejection p becomes the normalised
    ``max(p - q, 0)``, and q loses the guess.
    """
    if drawn is None:
        return sample(p, guesses, drawn)
    q = drawn.law.to(p)
    for token in drawn.tokens:
        if float(torch.rand(())) * float(q[token]) < float(p[token]):
            return token
        p = residual(p, q)
        q = q.clone()
        q[token] = 0
        total = q.sum()
        if total <= 0:
            break
        q = q / total
    return sample(p, guesses, None)


def k_seq(p: Tensor, guesses: Sequence[int], drawn: Drawn | None) -> int:
    """SpecTr's k-sequential selection (arXiv 2310.15141) over guesses drawn *with* replacement; exact.

    Each of the k guesses is accepted with ``min(1, p / (rho q))``, where rho in [1, k] makes the chance to accept one
    of them as large as this scheme allows; if none is, the token comes from what p has left.
    """
    if drawn is None:
        return sample(p, guesses, drawn)
    q, k = drawn.law.to(p), len(drawn.tokens)
    rho, beta, accepted = transport(p, q, k)
    for token in drawn.tokens:
        if float(torch.rand(())) * rho * float(q[token]) < float(p[token]):
            return token
    rest = p if beta <= 0 else (p - torch.minimum(q, p / rho) * (accepted / beta)).clamp_min(0)
    total = rest.sum()
    return sample(p if total <= 0 else rest / total, guesses, None)


def transport(p: Tensor, q: Tensor, k: int) -> tuple[float, float, float]:
    """SpecTr's division factor rho for k guesses, with beta(rho) and the chance that one of them is accepted.

    ``beta(rho) = sum min(q, p / rho)``; rho solves ``1 - (1 - beta)^k = rho beta`` in [1, k], by bisection.
    """
    likely = q > 0
    p, q = p[likely].double(), q[likely].double()

    def beta(rho: float) -> float:
        return float(torch.minimum(q, p / rho).sum())

    low, high = 1.0, float(k)
    while high - low > 1e-10:  # every rho that is large enough is exact, the least accepts most
        rho = (low + high) / 2
        if 1 - (1 - beta(rho)) ** k > rho * beta(rho):
            low = rho
        else:
            high = rho
    b = beta(high)
    return high, b, 1 - (1 - b) ** k


def typical(epsilon: float = 0.09, delta: float = 0.3) -> Rule:
    """Medusa's typical acceptance (arXiv 2401.10774): **lossy**, it takes guesses that are likely enough.

    A guess is taken if its probability exceeds ``min(epsilon, delta exp(-entropy))``, of several the likeliest; else
    the model's own likeliest token.
    """

    def rule(p: Tensor, guesses: Sequence[int], drawn: Drawn | None) -> int:
        best = max(guesses, key=lambda token: float(p[token]), default=None)
        if best is not None:
            entropy = float(torch.special.entr(p).sum())
            if float(p[best]) > min(epsilon, delta * 2.718281828459045**-entropy):
                return best
        return int(p.argmax())

    return rule


def residual(p: Tensor, q: Tensor) -> Tensor:
    """The normalised ``max(p - q, 0)``: the law of the token after a rejected draw from q; p where nothing is left."""
    rest = (p - q).clamp_min(0)
    total = rest.sum()
    return p if total <= 0 else rest / total


RULES: dict[str, Rule] = {"sample": sample, "reject": reject, "k_seq": k_seq, "typical": typical()}
LOSSY = ("typical",)


def rule_of(name: str) -> Rule:
    """The rule of this name. Raises ThriftError for another."""
    if name not in RULES:
        raise ThriftError(f"there is no verification rule '{name}'{did_you_mean(name, RULES)}")
    return RULES[name]
