"""How many tokens each layer prunes and merges, applied and learned (DiffRate, arXiv 2305.17997).

Kept numbers count all tokens, prefix included. Learning makes the number of a layer differentiable: over *candidates*
(every number of patches from all down to one) there is a distribution ``p = softmax(theta)``; the kept number is its
mean, rounded up, and a token of rank ``i`` survives with the probability of the candidates that keep it. Both are
rounded in the forward pass and not in the backward one (straight-through).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

# ---- applied ----------------------------------------------------------------------------------------------------


def rank_tokens(importance: Tensor, protected: Tensor) -> Tensor:
    """``(batch, tokens)`` int64 ranks, 0 the best: ``protected`` tokens, then by ``importance``; ties by position."""
    order = importance.to(torch.float32).masked_fill(protected, torch.inf)
    order = order.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def prune_and_merge(features: Tensor, rank: Tensor, prune: int, merge: int, protected: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the tokens of the lowest ranks; of the others, let those below the best ``merge`` join the most similar one.

    Args:
        features: ``(batch, tokens, dim)``, compared by cosine in float32.
        rank: ``(batch, tokens)`` from :func:`rank_tokens`.
        prune, merge: tokens kept after pruning, and after merging; ``merge <= prune <= tokens``, and ``merge`` is more
            than a row has protected tokens.
        protected: ``(batch, tokens)`` bool; they receive nothing.

    Returns:
        ``(batch, tokens)`` each: the token that every token joins, itself if it stays and -1 if it is dropped; and its
        similarity to that token, 1 for all that do not join another.
    """
    order = rank.argsort(dim=-1)
    takers, givers, dropped = order[:, :merge], order[:, merge:prune], order[:, prune:]
    joins = torch.arange(rank.shape[1], device=rank.device).repeat(rank.shape[0], 1)
    joins.scatter_(1, dropped, -1)
    similarity = torch.ones(rank.shape, device=rank.device)
    if givers.shape[1]:
        unit = normalize(features.detach().to(torch.float32), dim=-1)
        giving, taking = (unit.gather(1, i.unsqueeze(-1).expand(-1, -1, unit.shape[-1])) for i in (givers, takers))
        alike = giving @ taking.transpose(-1, -2)
        best, partner = alike.masked_fill(protected.gather(1, takers).unsqueeze(1), -torch.inf).max(-1)
        joins.scatter_(1, givers, takers.gather(1, partner))
        similarity.scatter_(1, givers, best)
    return joins, similarity


# ---- learned ----------------------------------------------------------------------------------------------------


def candidates(patches: int, granularity: int = 1) -> Tensor:
    """The numbers of patches that may be kept: ``patches``, then ``granularity`` fewer each, down to at least 1."""
    return torch.arange(patches, 0, -granularity, dtype=torch.float32)


def kept_number(theta: Tensor, candidates: Tensor, prefix: int) -> Tensor:
    """The differentiable number of tokens kept: the mean candidate, rounded up, and the prefix."""
    mean = theta.softmax(-1) @ candidates
    # What is above a whole number by the rounding of the softmax alone must not cost a token.
    return ste(torch.ceil(mean - 1e-4), mean) + prefix


def survival(theta: Tensor, candidates: Tensor, prefix: int, tokens: int) -> Tensor:
    """``(tokens,)``: for every rank, the probability of the candidates that keep it; 1 for the prefix."""
    rank = torch.arange(tokens, device=theta.device)
    return theta.softmax(-1) @ (rank < candidates.unsqueeze(-1) + prefix).to(theta.dtype)


def survival_mask(survival: Tensor, kept: int, before: int) -> Tensor:
    """``(tokens,)``: 0 for ranks ``kept`` to ``before - 1``, which go here, 1 for others; the gradient of survival."""
    rank = torch.arange(survival.shape[-1], device=survival.device)
    return ste(((rank < kept) | (rank >= before)).to(survival.dtype), survival)


def ste(value: Tensor, like: Tensor) -> Tensor:
    """``value``, with the gradient of ``like`` (straight-through)."""
    return value.detach() + (like - like.detach())


def ste_min(before: Tensor, *kept: Tensor) -> Tensor:
    """The least of the numbers. Each ``kept`` gets the whole gradient, whichever is least, and ``before`` none."""
    least = torch.stack([before, *kept]).detach().amin()
    for number in kept:
        least = least + (number - number.detach())
    return least


class LayerCost(NamedTuple):
    """FLOPs of a layer: attention's linear maps per token, its products per pair of tokens, the MLP per token.

    For a plain ViT of width C, in multiply-adds: ``4 C²``, ``2 C``, ``8 C²``.
    """

    attention: float
    pair: float
    mlp: float


def encoder_flops(tokens: int, kept: Sequence[tuple[Tensor, Tensor]], costs: Sequence[LayerCost]) -> Tensor:
    """The differentiable FLOPs of layers that keep ``(prune, merge)`` tokens between attention and MLP."""
    n = torch.tensor(float(tokens), device=kept[0][0].device)
    total = torch.zeros_like(n)
    for (prune, merge), cost in zip(kept, costs, strict=True):
        total = total + cost.attention * n + cost.pair * n * n
        n = ste_min(n, prune, merge)
        total = total + cost.mlp * n
    return total


def masked_softmax(scores: Tensor, mask: Tensor, eps: float = 1e-6) -> Tensor:
    """Softmax over the tokens of ``mask``, differentiable in it; every token also sees itself.

    Args:
        scores: ``(batch, heads, tokens, tokens)``.
        mask: ``(batch, tokens)``, 1 for tokens that are left and 0 for those that are gone.
        eps: what every entry gets a share of, so that no row is empty.

    Returns:
        float32 attention; rows sum to 1.
    """
    tokens = mask.shape[-1]
    scores = scores.to(torch.float32)
    seen = mask[:, None, None, :].to(torch.float32)
    seen = seen + (1 - seen) * torch.eye(tokens, device=mask.device)
    weight = (scores - scores.amax(-1, keepdim=True)).exp() * seen
    return (weight + eps / tokens) / (weight.sum(-1, keepdim=True) + eps)
