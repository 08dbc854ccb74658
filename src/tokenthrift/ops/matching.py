"""Bipartite soft matching: which tokens are most alike, decided in one pass, without iterating as k-means does."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core.tokenmap import TokenMap

Order = Literal["position", "official"]


class Groups(NamedTuple):
    """A partition of the tokens: what grouping operations return, and :meth:`map` turns into a TokenMap.

    Attributes:
        group: ``(batch, tokens)`` int64, the group that each token joins; -1 drops the token.
        n_groups: number of groups.
        anchor: ``(batch, n_groups)`` int64, the token that each group stands at.
        whole: known that no token is dropped and no group is empty, which makes the map faster to use.
        giver: ``(batch, r)`` int64, all tokens that are no anchors, where they are few and known: faster still.
    """

    group: Tensor
    n_groups: int
    anchor: Tensor
    whole: bool = False
    giver: Tensor | None = None

    @classmethod
    def of_pairs(cls, giver: Tensor, receiver: Tensor, tokens: int) -> Groups:
        """Every token of ``giver`` ``(batch, r)`` joins the token of ``receiver`` ``(batch, r)`` beside it.

        Givers are distinct and no receivers. The survivors anchor the groups, which keep their order.
        """
        merged = torch.zeros(giver.shape[0], tokens, dtype=torch.uint8, device=giver.device).scatter_(1, giver, 1)
        return cls.standing_at(merged.argsort(dim=-1, stable=True)[:, : tokens - giver.shape[1]], giver, receiver)

    @classmethod
    def standing_at(cls, anchor: Tensor, giver: Tensor, receiver: Tensor) -> Groups:
        """The same, with the groups in the order of their ``anchor`` ``(batch, n_groups)``: all that do not give."""
        batch, n_groups = anchor.shape
        slot = torch.arange(n_groups, device=anchor.device).expand(batch, -1)
        group = anchor.new_zeros(batch, n_groups + giver.shape[1]).scatter_(1, anchor, slot)
        return cls(group.scatter_(1, giver, group.gather(1, receiver)), n_groups, anchor, True, giver)

    def map(self, sizes: Tensor | None = None) -> TokenMap:
        """The map that averages every group, weighted by the ``sizes`` ``(batch, tokens)`` of its tokens."""
        if self.whole:
            return TokenMap.join(self.group, self.anchor, sizes, giver=self.giver)
        return TokenMap.merge(self.group, self.n_groups, weight=sizes, anchor=self.anchor)


def bipartite_soft_matching(
    metric: Tensor, r: int, protected: Tensor | None = None, order: Order = "position"
) -> Groups | None:
    """Merge the ``r`` tokens that have the most similar partner (Token Merging, arXiv 2210.09461, section 3.2).

    Tokens at even positions (A) propose to the token at an odd position (B) with the highest cosine similarity; the
    ``r`` best proposals are accepted. Several tokens of A may join one of B, which anchors the group.

    Args:
        metric: ``(batch, tokens, dim)`` what is compared; read in float32. An all-zero row resembles nothing (0).
        r: tokens to remove per row; clipped to half of the unprotected tokens, and to those that A holds.
        protected: ``(batch, tokens)`` bool, tokens that neither join a group nor receive one.
        order: of the survivors. ``position`` keeps theirs, so that provenance and positions stay readable. ``official``
            is that of the authors' code: protected tokens, what is left of A, B. It decides which tokens the next layer
            can compare. Where nothing is protected, what is left of A is ordered by falling similarity.

    Returns:
        The groups, or None when nothing can be merged. All rows remove the same number of tokens.
    """
    batch, tokens, _ = metric.shape
    r = min(r, most_mergeable(tokens, protected))
    if r <= 0:
        return None
    metric = normalize(metric.to(torch.float32), dim=-1)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    set_apart(scores, protected)
    best, partner = scores.max(-1)
    ranked = best.argsort(dim=-1, descending=True, stable=True)
    chosen, left = ranked[:, :r], ranked[:, r:]
    giver, receiver = 2 * chosen, 2 * partner.gather(1, chosen) + 1
    if order == "position":
        return Groups.of_pairs(giver, receiver, tokens)

    in_b = torch.arange(tokens, device=metric.device).remainder(2).expand(batch, -1)
    if protected is None or not bool(protected.any()):
        return Groups.standing_at(torch.cat([2 * left, in_b.nonzero()[:, 1].view(batch, -1)], dim=-1), giver, receiver)
    part = (in_b + 1).masked_fill(protected, 0).scatter(1, giver, 3)
    return Groups.standing_at(part.argsort(dim=-1, stable=True)[:, : tokens - r], giver, receiver)


def set_apart(scores: Tensor, protected: Tensor | None) -> None:
    """Write -inf to the ``scores`` ``(batch, A, B)`` of all pairs with a protected token, row by row: they are few."""
    if protected is None:
        return
    front = _leading(protected)
    if front is None:
        for of_pair, mask in ((scores, protected[:, ::2]), (scores.transpose(1, 2), protected[:, 1::2])):
            of_pair[mask.nonzero(as_tuple=True)] = -torch.inf
    else:
        scores[:, : (front + 1) // 2] = -torch.inf
        scores[:, :, : front // 2] = -torch.inf


def leading(count: int, batch: int, tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """The mask ``(batch, tokens)`` of the first ``count`` tokens, by which matching need not search them."""
    mask = (torch.arange(tokens, device=device) < count).expand(batch, tokens)
    mask._leading = count  # type: ignore[attr-defined]
    return mask


def _leading(protected: Tensor | None) -> int | None:
    """How many tokens :func:`leading` has marked; None = the mask must be read."""
    return None if protected is None else getattr(protected, "_leading", None)


def kth_bipartite_soft_matching(metric: Tensor, k: int, protected: Tensor | None = None) -> Groups | None:
    """Merge every token into the most similar k-th one: a division of their number by ``k`` in one step.

    Of the unprotected tokens every k-th (the k-th, the 2k-th, …) receives, all others join the most similar of these;
    the authors' code (Token Merging, arXiv 2210.09461) drops the tokens after the last of them, here these join too.

    Args:
        metric: ``(batch, tokens, dim)`` what is compared, by cosine; read in float32.
        k: at least 1, which merges nothing.
        protected: ``(batch, tokens)`` bool, equally many a row: tokens that neither join a group nor receive one.

    Returns:
        The groups in the order of their receivers and of the protected tokens, or None when nothing can be merged.
    """
    batch, tokens, _ = metric.shape
    free = torch.ones(batch, tokens, dtype=torch.bool, device=metric.device) if protected is None else ~protected
    receives = free & (free.cumsum(-1) % k == 0)
    gives = free & ~receives
    if not bool(receives.any()) or not bool(gives.any()):
        return None
    giver, taker = (mask.nonzero()[:, 1].view(batch, -1) for mask in (gives, receives))
    metric = normalize(metric.to(torch.float32), dim=-1)
    return Groups.of_pairs(giver, most_similar(metric, giver, taker), tokens)


def most_similar(metric: Tensor, giver: Tensor, taker: Tensor) -> Tensor:
    """For each token of ``giver`` ``(batch, a)`` the token of ``taker`` ``(batch, b)`` with the largest dot product.

    Args:
        metric: ``(batch, tokens, dim)``, normalised where cosines are meant.
        giver, taker: ``(batch, a)`` and ``(batch, b)`` int64, indices of tokens.

    Returns:
        ``(batch, a)`` int64, indices of tokens.
    """
    row = torch.arange(metric.shape[0], device=metric.device).unsqueeze(-1)
    scores = metric[row, giver] @ metric[row, taker].transpose(-1, -2)
    return taker.gather(1, scores.argmax(-1))


def most_mergeable(tokens: int, protected: Tensor | None = None) -> int:
    """The most tokens that one round of bipartite matching can remove from every row of the batch."""
    front = 0 if protected is None else _leading(protected)
    if front is not None:
        in_a, in_b = free_in_each(tokens, protected)
        return max(min((in_a + in_b) // 2, in_a), 0) if in_b > 0 else 0
    assert protected is not None
    free = ~protected
    givers, takers = free[:, ::2].sum(-1), free[:, 1::2].sum(-1)
    most = torch.minimum((givers + takers) // 2, givers) * (takers > 0)
    return int(most.min()) if most.numel() else 0


def free_in_each(tokens: int, protected: Tensor | None) -> tuple[int, int]:
    """The unprotected tokens at even positions, and those at odd ones: of each as many as every row has."""
    front = 0 if protected is None else _leading(protected)
    if front is not None:
        return (tokens + 1) // 2 - (front + 1) // 2, tokens // 2 - front // 2
    assert protected is not None
    in_a, in_b = (int((~protected[:, start::2]).sum(-1).min()) for start in (0, 1))
    return in_a, in_b


def fewest_free(protected: Tensor) -> int:
    """How many unprotected tokens every row has at least."""
    front = _leading(protected)
    free = (~protected).sum(-1).min() if front is None else protected.shape[1] - front
    return max(int(free), 0)


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
