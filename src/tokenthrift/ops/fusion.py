"""Matching by several criteria, in both directions (Multi-criteria Token Fusion, arXiv 2403.10030)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .matching import Groups, free_in_each, most_mergeable, set_apart


def multi_criteria_matching(
    metric: Tensor,
    r: int,
    *,
    received: Tensor | None = None,
    sizes: Tensor | None = None,
    protected: Tensor | None = None,
    tau_sim: float = 1.0,
    tau_info: float = 20.0,
    tau_size: float = 40.0,
    bidirectional: bool = True,
) -> Groups | None:
    """Merge the ``r`` tokens that are alike, little attended to and small.

    A token at an even position (A) and one at an odd position (B) score
    ``((cos + 1) / 2)^(1/tau_sim) * (i_a i_b)^(1/tau_info) * (z_a z_b)^(1/tau_size)``, where ``i`` is one over the
    attention that a token receives and ``z`` one over its size, both divided by their maximum in the row. First
    ``r // 2`` tokens of A join their best partner in B; then the other ``r - r // 2`` are taken from B, whose tokens
    join their best partner among those left in A, with the scores of before. A token of B takes along what has joined
    it.

    Survivors keep their order (the authors' code puts those left in A first).

    Args:
        metric: ``(batch, tokens, dim)`` what is compared; read in float32. An all-zero row has cosine 0 to everything.
        r: tokens to remove per row; clipped to half of the unprotected tokens.
        received: ``(batch, tokens)`` mean attention that each token gets, for ``tau_info``; None leaves it out.
        sizes: ``(batch, tokens)``, for ``tau_size``; None leaves it out.
        protected: ``(batch, tokens)`` bool, tokens that neither join a group nor receive one.
        tau_sim, tau_info, tau_size: temperatures; the larger, the less a criterion says; 0 turns it off.
        bidirectional: False takes all ``r`` tokens from A, as Token Merging does.

    Returns:
        The groups, or None when nothing can be merged. All rows remove the same number of tokens.
    """
    batch, tokens, _ = metric.shape
    from_a, from_b = _directions(tokens, r, protected, bidirectional)
    if from_a + from_b <= 0:
        return None
    scores = _scores(metric, received, sizes, tau_sim, tau_info, tau_size)
    set_apart(scores, protected)

    joins = torch.arange(tokens, device=metric.device).repeat(batch, 1)
    row = torch.arange(batch, device=metric.device).unsqueeze(1)
    leave = []
    if from_a:
        best, partner = scores.max(2)
        chosen = best.argsort(dim=-1, descending=True, stable=True)[:, :from_a]
        leave.append(2 * chosen)
        joins.scatter_(1, 2 * chosen, 2 * partner.gather(1, chosen) + 1)
        scores[row, chosen] = -torch.inf  # gone: no partner any more
    if from_b:
        best, partner = scores.max(1)
        chosen = best.argsort(dim=-1, descending=True, stable=True)[:, :from_b]
        leave.append(2 * chosen + 1)
        joins.scatter_(1, 2 * chosen + 1, 2 * partner.gather(1, chosen))
        joins = joins.gather(1, joins)  # from A to B and with it back to A: no chain is longer
    giver = torch.cat(leave, dim=1)
    return Groups.of_pairs(giver, joins.gather(1, giver), tokens)


def groups_of(joins: Tensor, n_groups: int) -> Groups:
    """The groups of tokens that join others.

    Args:
        joins: ``(batch, tokens)`` int64, the token that each one joins: itself if it stays (and then anchors its
            group), -1 if it is dropped.
        n_groups: how many stay, in every row.
    """
    gone = joins != torch.arange(joins.shape[1], device=joins.device)
    slot = (~gone).cumsum(-1) - 1
    return Groups(
        group=torch.where(joins < 0, -1, slot.gather(1, joins.clamp(min=0))),
        n_groups=n_groups,
        anchor=gone.to(torch.uint8).argsort(dim=-1, stable=True)[:, :n_groups],
    )


def _directions(tokens: int, r: int, protected: Tensor | None, bidirectional: bool) -> tuple[int, int]:
    """How many tokens leave A, and how many then leave B."""
    r = min(r, most_mergeable(tokens, protected))
    if r <= 0 or not bidirectional:
        return max(r, 0), 0
    if protected is None:
        a, b = (tokens + 1) // 2, tokens // 2
    else:
        a, b = free_in_each(tokens, protected)
    from_a = min(r // 2, a - 1)  # one of A must be left to receive
    return from_a, min(r - from_a, b)


def _scores(
    metric: Tensor, received: Tensor | None, sizes: Tensor | None, tau_sim: float, tau_info: float, tau_size: float
) -> Tensor:
    """``(batch, tokens of A, tokens of B)``, none below 0."""
    metric = normalize(metric.to(torch.float32), dim=-1)
    a, b = metric[:, ::2], metric[:, 1::2]
    if tau_sim:
        # Rounding may put a cosine just below -1, and a root of what is below 0 is not a number.
        scores = (a @ b.transpose(-1, -2)).add_(1).div_(2).clamp_(min=0)
        if tau_sim != 1:
            scores = scores ** (1 / tau_sim)
    else:
        scores = metric.new_ones(metric.shape[0], a.shape[1], b.shape[1])
    for values, tau in ((received, tau_info), (sizes, tau_size)):
        if tau and values is not None:
            inverse = 1 / values.to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
            inverse = inverse / inverse.amax(-1, keepdim=True)
            root = inverse ** (1 / tau)  # of the tokens, not of their pairs
            scores = scores.mul_(root[:, ::2, None]).mul_(root[:, None, 1::2])
    return scores
