"""Which blocks of the attention matrix to compute when queries and keys are clustered (arXiv 2505.18875).

Tokens of one cluster stand side by side after sorting by label, so a pair of clusters is a block of the matrix. The
centroids tell how much attention a block will get before any of it is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def dynamic_block_map(
    queries: Tensor, keys: Tensor, key_sizes: Tensor, top_p: float, min_share: float = 0.0, scaling: float | None = None
) -> Tensor:
    """The key clusters that each query cluster looks at: the heaviest, until they hold ``top_p`` of its attention.

    The attention of a query centroid over the key centroids is a softmax in which each cluster counts as often as it
    has keys. At least one cluster is kept, and at least ``int(min_share * key clusters)``. Empty clusters have no
    weight; ties are broken by the order of the clusters.

    Args:
        queries: ``(..., query clusters, dim)`` centroids.
        keys: ``(..., key clusters, dim)`` centroids.
        key_sizes: ``(..., key clusters)``, number of keys in each.
        top_p: share of the attention to cover, in [0, 1]; from 1 on every cluster with weight is kept.
        min_share: share of the key clusters that are kept in any case.
        scaling: factor on ``q·k``; ``dim ** -0.5`` when None.

    Returns:
        ``(..., query clusters, key clusters)`` bool.
    """
    scaling = queries.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (queries.to(torch.float32) @ keys.to(torch.float32).transpose(-1, -2)) * scaling
    weight = torch.softmax(scores + key_sizes.to(torch.float32).log().unsqueeze(-2), dim=-1)  # log 0 = -inf
    heaviest, order = weight.sort(dim=-1, descending=True, stable=True)
    before = pad(heaviest.cumsum(-1)[..., :-1], (1, 0))  # what the heavier clusters hold already
    rank = torch.arange(keys.shape[-2], device=keys.device)
    # A cluster is wanted while those before it hold no more than top_p: the one that crosses the line is kept.
    wanted = before <= top_p if top_p < 1 else heaviest > 0
    wanted = wanted | (rank < max(1, int(min_share * keys.shape[-2])))
    return torch.zeros_like(wanted).scatter_(-1, order, wanted)


def expand_block_map(blocks: Tensor, query_labels: Tensor, key_labels: Tensor) -> Tensor:
    """The map as a mask of tokens, for attention functions that take one.

    Args:
        blocks: ``(..., query clusters, key clusters)`` bool.
        query_labels: ``(..., queries)`` int64, the cluster of each; ``key_labels`` ``(..., keys)``.

    Returns:
        ``(..., queries, keys)`` bool.
    """
    rows = blocks.gather(-2, query_labels.unsqueeze(-1).expand(*query_labels.shape, blocks.shape[-1]))
    return rows.gather(-1, key_labels.unsqueeze(-2).expand(*query_labels.shape, key_labels.shape[-1]))


def block_density(blocks: Tensor, query_sizes: Tensor, key_sizes: Tensor) -> Tensor:
    """Share of the full attention matrix that the map computes, ``(...)``; sizes are those of the clusters."""
    computed = (blocks * query_sizes.unsqueeze(-1) * key_sizes.unsqueeze(-2)).sum((-1, -2))
    return computed / (query_sizes.sum(-1) * key_sizes.sum(-1))
