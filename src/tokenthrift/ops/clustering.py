"""Clustering of tokens: k-medoids, density peaks, and soft assignments. All of it batched, deterministic, in float32.

Rows of a batch never affect each other. Clusterings return ``(medoids, assign)``: ``medoids`` ``(batch, k)`` int64, the
token at the centre of each cluster, and ``assign`` ``(batch, tokens)`` int64, the cluster of each token. A medoid is
always of its own cluster, so that no cluster is empty even when tokens are equal. ``k`` is clipped to the number of
tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, layer_norm, normalize

Metric = Literal["euclidean", "cosine"]

PLAIN_FROM = 0.03
"""From this ``eps`` on the exponentials of Sinkhorn's iterations stay within float32, without logarithms."""


def distances(x: Tensor, metric: Metric = "euclidean") -> Tensor:
    """Between all pairs of tokens ``(batch, tokens, dim)``, 0 on the diagonal: ``(batch, tokens, tokens)`` float32."""
    if metric == "cosine":
        unit = unit_rows(x)
        d = 1 - unit @ unit.transpose(-1, -2)
    else:
        x = x.to(torch.float32)
        d = torch.cdist(x, x)
    # A product of matrices leaves rounding errors there.
    d.diagonal(dim1=-2, dim2=-1).zero_()
    return d


def unit_rows(x: Tensor) -> Tensor:
    """Rows divided by their norm in float32, as CenterCLIP does it: all-zero rows stay zero."""
    x = x.to(torch.float32)
    unit: Tensor = x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-6)
    return unit


# ---- k-medoids ------------------------------------------------------------------------------------------------------


def farthest_first(x: Tensor, k: int, metric: Metric = "euclidean", d: Tensor | None = None) -> Tensor:
    """KKZ initialisation: the token of the largest norm, then always the one farthest from those chosen.

    Katsavounidis, Kuo and Zhang, IEEE Signal Processing Letters 1(10), 1994. ``d`` are the ``distances`` if known.
    Returns ``(batch, k)`` indices in the order of choice.
    """
    x = x.to(torch.float32)
    d = distances(x, metric) if d is None else d
    batch, tokens, _ = x.shape
    chosen = x.new_zeros(batch, min(k, tokens), dtype=torch.int64)
    row = torch.arange(batch, device=x.device)
    nearest = x.new_full((batch, tokens), torch.inf)  # distance to the nearest chosen token
    pick = torch.linalg.vector_norm(x, dim=-1).argmax(-1)
    for i in range(chosen.shape[1]):
        chosen[:, i] = pick
        nearest = torch.minimum(nearest, d[row, pick])
        nearest[row, pick] = -1  # below all others, so that it is not chosen again among equal tokens
        pick = nearest.argmax(-1)
    return chosen


def k_medoids(
    x: Tensor, k: int, metric: Metric = "euclidean", iterations: int = 100, pre_norm: bool = False
) -> tuple[Tensor, Tensor]:
    """k-medoids++ of CenterCLIP (arXiv 2205.00823): KKZ initialisation, then assigning and re-centring by turns.

    The new medoid of a cluster is the member with the smallest sum of distances to the members. Stops when no medoid
    moves (the authors: when they move less than 1e-5 on average over the batch).

    Args:
        x: ``(batch, tokens, dim)``.
        k: number of clusters.
        metric: "euclidean" or "cosine" distance. The first token chosen is that of the largest norm with either.
        iterations: the most there are.
        pre_norm: divide tokens by their norm first.

    Returns:
        ``(medoids, assign)``, medoids in ascending order.
    """
    x = unit_rows(x) if pre_norm else x
    d = distances(x, metric)
    d = d + d.transpose(-1, -2)  # twice as far, but exactly symmetric: two members must not differ by a rounding error
    medoids = farthest_first(x, k, d=d)
    for _ in range(iterations):
        assign = _nearest(d, medoids)
        within = _to_each(d, assign, medoids.shape[1]).gather(1, assign.unsqueeze(1)).squeeze(1)
        moved = _lowest_of_each(within, assign, medoids.shape[1])
        if torch.equal(moved, medoids):
            break
        medoids = moved
    medoids = medoids.sort(dim=-1).values
    return medoids, _nearest(d, medoids)


def weighted_k_medoids(x: Tensor, k: int, weight: Tensor, iterations: int = 3) -> tuple[Tensor, Tensor]:
    """k-medoids of the comparison "Which Tokens to Use?" (arXiv 2308.04657): starts from the ``k`` heaviest tokens.

    The new medoid of a cluster is the member that minimises its weight times its sum of distances to *all* tokens. This
    is what the authors' code does; textbook k-medoids would sum over the members, and weigh these.

    Args:
        x: ``(batch, tokens, dim)``.
        k: number of clusters.
        weight: ``(batch, tokens)``, non-negative.
        iterations: how often medoids are moved.

    Returns:
        ``(medoids, assign)``, medoids in the order of the weights of those they began as.
    """
    d = distances(x)
    cost = weight.to(torch.float32) * d.sum(-1)
    medoids = ranked(weight)[:, :k]
    for _ in range(iterations):
        medoids = _lowest_of_each(cost, _nearest(d, medoids), medoids.shape[1])
    return medoids, _nearest(d, medoids)


def _nearest(d: Tensor, medoids: Tensor) -> Tensor:
    """``(batch, tokens)``: which medoid is nearest to each token; to a medoid it is itself."""
    row = torch.arange(len(d), device=d.device).unsqueeze(-1)
    to_medoids = d[row, medoids]  # (batch, k, tokens)
    return to_medoids.scatter_(2, medoids.unsqueeze(-1), -1.0).min(1).indices


def _to_each(d: Tensor, assign: Tensor, k: int) -> Tensor:
    """``(batch, k, tokens)``: the sum of each token's distances to the members of each cluster."""
    batch, tokens = assign.shape
    slot, order = (assign + k * torch.arange(batch, device=d.device).unsqueeze(1)).flatten().sort(stable=True)
    start = torch.searchsorted(slot, torch.arange(batch * k, device=d.device))
    return embedding_bag(order, d.flatten(0, 1), start, mode="sum").view(batch, k, tokens)


def _lowest_of_each(cost: Tensor, assign: Tensor, k: int) -> Tensor:
    """``(batch, k)``: the token of the lowest ``cost`` ``(batch, tokens)`` in each cluster; the first of equals."""
    batch, tokens = cost.shape
    lowest = cost.new_full((batch, k), torch.inf).scatter_reduce_(1, assign, cost, "amin")
    token = torch.arange(tokens, device=cost.device).expand(batch, tokens)
    token = torch.where(cost == lowest.gather(1, assign), token, tokens)
    return token.new_full((batch, k), tokens).scatter_reduce_(1, assign, token, "amin")


# ---- density peaks --------------------------------------------------------------------------------------------------


def dpc_knn(x: Tensor, k: int, neighbours: int = 5, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Density peaks clustering with k nearest neighbours (DPC-KNN), as TCFormer (arXiv 2204.08680) uses it for tokens.

    A token's density is ``exp(-mean d²)`` over its nearest neighbours (itself among them), with ``d`` the Euclidean
    distance over ``sqrt(dim)``. Centres are the ``k`` tokens with the largest density times distance to the nearest
    denser token (the densest of all: the largest distance there is); others join the nearest centre.

    Args:
        x: ``(batch, tokens, dim)``.
        k: number of clusters.
        neighbours: how many tokens a density looks at, itself included.
        noise: ``(batch, tokens)`` added to the densities so that none are equal: the authors add uniform noise below
            1e-6. None, our default: among equal densities, the earlier token counts as the denser one.

    Returns:
        ``(centres, assign)``, centres by descending score.
    """
    d = distances(x) / x.shape[-1] ** 0.5
    tokens = x.shape[1]
    density = d.topk(min(neighbours, tokens), largest=False).values.square().mean(-1).neg().exp()
    if noise is not None:
        density = density + noise
    rank = ranked(density).argsort(dim=-1)
    denser = rank.unsqueeze(-2) < rank.unsqueeze(-1)
    apart = torch.where(denser, d, d.amax((-1, -2), keepdim=True)).amin(-1)
    centres = ranked(apart * density)[:, :k]
    return centres, _nearest(d, centres)


# ---- soft assignments -----------------------------------------------------------------------------------------------
# All return shares (batch, k, tokens), as TokenMap.transform takes them.


def sinkhorn_shares(x: Tensor, centres: Tensor, eps: float = 1.0, iterations: int = 3) -> Tensor:
    """Optimal transport from tokens to centres by Sinkhorn's iterations (arXiv 2308.04657).

    The reward is the cosine between token and centre, all marginals are the same, and the result is scaled such that
    every token hands out a mass of 1. What the centres receive is even only in the limit of many iterations.

    Args:
        x: ``(batch, tokens, dim)``.
        centres: ``(k, dim)`` or ``(batch, k, dim)``.
        eps: strength of the entropy: smaller is sharper.
        iterations: each one fits the centres' marginals, then the tokens'.
    """
    x, centres = (normalize(t.to(torch.float32), dim=-1) for t in (x, centres))
    scores = centres @ x.transpose(-1, -2) / eps
    if eps >= PLAIN_FROM:
        shares, of_token = scores.exp_(), torch.ones_like(scores[:, 0])
        for _ in range(iterations):
            of_centre = 1 / (shares @ of_token.unsqueeze(-1)).squeeze(-1)
            of_token = 1 / (of_centre.unsqueeze(-2) @ shares).squeeze(-2)
        return shares * of_centre.unsqueeze(-1) * of_token.unsqueeze(-2)
    of_token = torch.zeros_like(scores[:, :1])
    for _ in range(iterations):
        of_centre = -(scores + of_token).logsumexp(-1, keepdim=True)
        of_token = -(scores + of_centre).logsumexp(-2, keepdim=True)
    return (scores + of_centre + of_token).exp()


def anchor_shares(metric: Tensor, anchors: Tensor, temperature: float, hard_anchors: bool = True) -> Tensor:
    """Every token hands out a mass of 1 over the anchors: softmax over the anchors of their cosine / temperature.

    Args:
        metric: ``(batch, tokens, dim)`` what is compared.
        anchors: ``(batch, k)`` int64.
        temperature: above 0; towards 0 each token gives all to its nearest anchor.
        hard_anchors: an anchor gives all to itself.
    """
    metric = normalize(metric.to(torch.float32), dim=-1)
    at = anchors.unsqueeze(-1).expand(-1, -1, metric.shape[-1])
    shares = (metric.gather(1, at) @ metric.transpose(-1, -2) / temperature).softmax(1)
    if hard_anchors:
        own = torch.eye(anchors.shape[1], device=metric.device).expand(len(metric), -1, -1)
        shares = shares.scatter(2, anchors.unsqueeze(1).expand_as(own), own)
    return shares


def query_pooling(
    x: Tensor, queries: Tensor, norm: tuple[Tensor, Tensor] | None = None, scaled: bool = False
) -> tuple[Tensor, Tensor]:
    """PatchMerger's pooling (arXiv 2202.12015): each of ``k`` learned queries averages the tokens that it attends to.

    Args:
        x: ``(batch, tokens, dim)``.
        queries: ``(k, dim)``.
        norm: weight and bias of the LayerNorm that the tokens go through first.
        scaled: divide the scores by ``sqrt(dim)``, as attention does and PatchMerger does not.

    Returns:
        The pooled (normalised) tokens ``(batch, k, dim)``, and the weights ``(batch, k, tokens)``, whose rows sum to 1.
    """
    if norm is not None:
        x = layer_norm(x, x.shape[-1:], *norm)
    scores = queries @ x.transpose(-1, -2)
    weights = (scores * x.shape[-1] ** -0.5 if scaled else scores).softmax(-1)
    return weights @ x, weights


def ranked(scores: Tensor) -> Tensor:
    """Indices by descending score along the last dimension; of equals the earlier one is first."""
    return scores.argsort(dim=-1, descending=True, stable=True)
