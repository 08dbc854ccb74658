"""Clustering of the tokens that may be merged, and maps of all tokens from it.

Protected tokens (CLS, registers, the end of a text) stay as they are. Outputs are in the order of the tokens that they
stand at, so that a prefix stays in front. All rows of a batch protect the same number of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.tokenmap import TokenMap


def split_protected(protected: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the free tokens and of the protected ones, each in order, from ``(batch, tokens)`` bool."""
    free = int((~protected[0]).sum())
    order = protected.to(torch.uint8).argsort(dim=-1, stable=True)
    return order[:, :free], order[:, free:]


def take(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of ``x`` ``(batch, tokens, dim)`` at ``index`` ``(batch, m)``."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def clusters_to_map(protected: Tensor, medoids: Tensor, assign: Tensor | None = None, frames: int = 1) -> TokenMap:
    """Every cluster becomes one token: the mean of its members, or its medoid.

    Args:
        protected: ``(batch, tokens)`` bool.
        medoids: ``(batch, k)`` where clusters stand, as indices among the free tokens.
        assign: ``(batch, free)`` the cluster of each free token; None = the medoids stay, other free tokens go.
        frames: so many sequences stand one behind the other: their protected tokens are averaged one by one.
    """
    free, held = split_protected(protected)
    own = held.shape[1] // frames
    n_out = own + medoids.shape[1]
    anchor = torch.cat([held[:, :own], free.gather(1, medoids)], dim=1)
    if assign is None and frames == 1:
        return TokenMap.select(anchor.sort(dim=-1).values, protected.shape[1])
    group = torch.full(protected.shape, -1, device=protected.device)
    group.scatter_(1, held, (torch.arange(held.shape[1], device=held.device) % max(own, 1)).expand_as(held))
    if assign is None:
        group.scatter_(1, anchor[:, own:], torch.arange(own, n_out, device=held.device).expand_as(medoids))
    else:
        group.scatter_(1, free, own + assign)
    anchor, order = anchor.sort(dim=-1)
    rank = order.argsort(dim=-1)
    group = torch.where(group < 0, -1, rank.gather(1, group.clamp(min=0)))
    return TokenMap.merge(group, n_out, anchor=anchor)


def shares_to_map(protected: Tensor, anchors: Tensor, shares: Tensor, sizes: Tensor) -> TokenMap:
    """The many-to-many map in which the free tokens hand out their mass by ``shares``.

    Args:
        protected: ``(batch, tokens)`` bool.
        anchors: ``(batch, k)`` where outputs stand, as indices among the free tokens.
        shares: ``(batch, k, free)``; columns sum to 1.
        sizes: ``(batch, tokens)``.
    """
    free, held = split_protected(protected)
    (batch, k), own = anchors.shape, held.shape[1]
    full = torch.zeros(batch, own + k, protected.shape[1], device=shares.device)
    full[:, own:].scatter_(2, free.unsqueeze(1).expand(-1, k, -1), shares)
    full[:, :own].scatter_(2, held.unsqueeze(-1), 1.0)
    anchor, order = torch.cat([held, free.gather(1, anchors)], dim=1).sort(dim=-1)
    return TokenMap.transform(take(full, order), sizes, anchor)
