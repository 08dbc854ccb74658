"""Bipartite soft matching: which tokens are most alike, decided in one pass, without iterating as k-means does."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core.tokenmap import TokenMap


class Groups(NamedTuple):
    """A partition of the tokens: what grouping operations return, and :meth:`map` turns into a TokenMap.

    Attributes:
        group: ``(batch, tokens)`` int64, the group that each token joins; -1 drops the token.
        n_groups: number of groups.
        anchor: ``(batch, n_groups)`` int64, the token that each group stands at.
    """

    group: Tensor
    n_groups: int
    anchor: Tensor

    def map(self, sizes: Tensor | None = None) -> TokenMap:
        """The map that averages every group, weighted by the ``sizes`` ``(batch, tokens)`` of its tokens."""
        return TokenMap.merge(self.group, self.n_groups, weight=sizes, anchor=self.anchor)


def bipartite_soft_matching(metric: Tensor, r: int, protected: Tensor | None = None) -> Groups | None:
    """Merge the ``r`` tokens that have the most similar partner (Token Merging, arXiv 2210.09461, section 3.2).

    Tokens at even positions (A) propose to the token at an odd position (B) with the highest cosine similarity; the
    ``r`` best proposals are accepted. Several tokens of A may join one of B, which anchors the group. Survivors keep
    their order, so provenance and positions stay readable (the authors' code puts the tokens left in A first).

    Args:
        metric: ``(batch, tokens, dim)`` what is compared; read in float32. An all-zero row resembles nothing (0).
        r: tokens to remove per row; clipped to half of the unprotected tokens, and to those that A holds.
        protected: ``(batch, tokens)`` bool, tokens that neither join a group nor receive one.

    Returns:
        The groups, or None when nothing can be merged. All rows remove the same number of tokens.
    """
    batch, tokens, _ = metric.shape
    r = min(r, most_mergeable(tokens, protected))
    if r <= 0:
        return None
    metric = normalize(metric.to(torch.float32), dim=-1)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    if protected is not None:
        row, column = protected[:, 1::2].nonzero(as_tuple=True)  # few: no pass over the whole matrix
        scores[row, :, column] = -torch.inf
    best, partner = scores.max(-1)
    if protected is not None:
        best = best.masked_fill(protected[:, ::2], -torch.inf)
    chosen = best.argsort(dim=-1, descending=True, stable=True)[:, :r]

    merged = torch.zeros(batch, tokens, dtype=torch.bool, device=metric.device).scatter_(1, 2 * chosen, True)
    slot = (~merged).cumsum(-1) - 1  # of survivors: their rank
    receiver = 2 * partner.gather(1, chosen) + 1
    return Groups(
        group=slot.scatter(1, 2 * chosen, slot.gather(1, receiver)),
        n_groups=tokens - r,
        anchor=merged.to(torch.uint8).argsort(dim=-1, stable=True)[:, : tokens - r],
    )


def most_mergeable(tokens: int, protected: Tensor | None = None) -> int:
    """The most tokens that one round of bipartite matching can remove from every row of the batch."""
    if protected is None:
        return tokens // 2
    free = ~protected
    givers, takers = free[:, ::2].sum(-1), free[:, 1::2].sum(-1)
    most = torch.minimum((givers + takers) // 2, givers) * (takers > 0)
    return int(most.min()) if most.numel() else 0


def merged_pairs(map: TokenMap, metric: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs that an exclusive merge joined, best match first.

    Args:
        map: a merge that removes as many tokens of every row, and drops none.
        metric: ``(batch, tokens, dim)`` what the matching compared.

    Returns:
        ``(batch, n_in - n_out)`` int64 each: the tokens that joined another, and the tokens that they joined.
    """
    stays = torch.zeros(*map.lead, map.n_in, dtype=torch.uint8, device=map.device).scatter_(1, map.anchors, 1)
    source = stays.argsort(dim=-1, stable=True)[:, : map.n_in - map.n_out]
    target = map.anchors.gather(1, map.owner.gather(1, source))
    metric = normalize(metric.to(torch.float32), dim=-1)
    rows = torch.arange(len(metric), device=metric.device).unsqueeze(-1)
    rank = (metric[rows, source] * metric[rows, target]).sum(-1).argsort(dim=-1, descending=True, stable=True)
    return source.gather(1, rank), target.gather(1, rank)
