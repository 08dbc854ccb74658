"""Tokens that are far from each other: the max-min diversity problem, solved greedily."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

WHOLE = 8192
"""So many tokens have their distances held as one matrix; of more, each row is computed when it is read."""
BLOCK = 512


def max_min_diversity(features: Tensor, counts: Tensor | int, mask: Tensor | None = None) -> Tensor:
    """Choose tokens one by one, each as far as can be from those chosen before, by cosine distance.

    The first is the token whose nearest other one is farthest. After it the token whose distance to the nearest chosen
    one is largest. That distance is kept up to date as tokens are chosen: ``tokens`` steps for each of them, and not
    as many times the tokens chosen so far. Of equally far tokens the earlier one is chosen.

    Args:
        features: ``(batch, tokens, dim)``; read in float32. An all-zero row is at distance 1 from all others.
        counts: how many to choose: of every row, or ``(batch,)``; clipped to the row's real tokens.
        mask: ``(batch, tokens)`` bool, true for the tokens that may be chosen; the others count for nothing.

    Returns:
        ``(batch, most)`` int64, indices in the order of choice; -1 behind those of a row that chooses fewer.
    """
    unit = normalize(features.to(torch.float32), dim=-1)
    batch, n, _ = unit.shape
    real = torch.ones(batch, n, dtype=torch.bool, device=unit.device) if mask is None else mask
    wanted = torch.minimum(torch.as_tensor(counts, device=unit.device).expand(batch), real.sum(1))
    row = torch.arange(batch, device=unit.device)
    whole = 1 - unit @ unit.transpose(1, 2) if n <= WHOLE else None

    def from_token(token: Tensor) -> Tensor:
        """Distances of one token of each row, ``(batch,)``, to all: ``(batch, tokens)``."""
        if whole is not None:
            return whole[row, token]
        return 1 - torch.einsum("bnd,bd->bn", unit, unit[row, token])

    nearest = torch.full((batch, n), torch.inf, device=unit.device)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        block = 1 - unit[:, start:stop] @ unit.transpose(1, 2) if whole is None else whole[:, start:stop]
        block = block.masked_fill(~real.unsqueeze(1), torch.inf)
        block.diagonal(offset=start, dim1=1, dim2=2).fill_(torch.inf)
        nearest[:, start:stop] = block.amin(-1)

    steps = int(wanted.max()) if batch else 0
    chosen = torch.full((batch, steps), -1, device=unit.device)
    token = nearest.masked_fill(~real, -torch.inf).argmax(1)
    gap = torch.zeros_like(nearest).masked_fill_(real, torch.inf).masked_fill_(~real, -torch.inf)
    for i in range(steps):
        chosen[:, i] = token
        gap = torch.minimum(gap, from_token(token))
        gap[row, token] = -torch.inf  # below all others, so that it is not chosen again among equal tokens
        token = gap.argmax(1)
    return torch.where(torch.arange(steps, device=unit.device) < wanted.unsqueeze(1), chosen, -1)
