"""Tokens that are far from each other: the max-min diversity problem, solved greedily."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

WHOLE = 8192
"""So many tokens have their distances held as one matrix; of more, each row is computed when it is read."""
BLOCK = 256


def max_min_diversity(
    features: Tensor, counts: Tensor | int, mask: Tensor | None = None, d: Tensor | None = None
) -> Tensor:
    """Choose tokens one by one, each as far as can be from those chosen before, by cosine distance.

    The first is the token whose nearest other one is farthest. After it the token whose distance to the nearest chosen
    one is largest. That distance is kept up to date as tokens are chosen: ``tokens`` steps for each of them, and not
    as many times the tokens chosen so far. Of equally far tokens the earlier one is chosen.

    Args:
        features: ``(batch, tokens, dim)``; read in float32. An all-zero row is at distance 1 from all others.
        counts: how many to choose: of every row, or ``(batch,)``; clipped to the row's real tokens.
        mask: ``(batch, tokens)`` bool, true for the tokens that may be chosen; the others count for nothing.
        d: ``(batch, tokens, tokens)``, the distances if known: any that are symmetric; features are then not read.

    Returns:
        ``(batch, most)`` int64, indices in the order of choice; -1 behind those of a row that chooses fewer.
    """
    batch, n, _ = features.shape
    device = features.device
    row = torch.arange(batch, device=device)
    unit = features if d is not None else normalize(features.to(torch.float32), dim=-1)
    if d is None and n <= WHOLE:
        d = 1 - unit @ unit.transpose(1, 2)

    def from_token(token: Tensor) -> Tensor:
        """Distances of one token of each row, ``(batch,)``, to all: ``(batch, tokens)``."""
        return d[row, token] if d is not None else 1 - torch.einsum("bnd,bd->bn", unit, unit[row, token])

    none = torch.full((batch, n), torch.inf, device=device)
    gone = torch.zeros_like(none, dtype=torch.bool) if mask is None else ~mask
    nearest = none.clone()
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        block = 1 - unit[:, start:stop] @ unit.transpose(1, 2) if d is None else d[:, start:stop].clone()
        block.diagonal(offset=start, dim1=1, dim2=2).fill_(torch.inf)
        if mask is not None:
            block.masked_fill_(gone.unsqueeze(1), torch.inf)
        nearest[:, start:stop] = block.amin(-1)

    wanted = torch.minimum(torch.as_tensor(counts, device=device).expand(batch), (~gone).sum(1))
    steps = int(wanted.max()) if batch else 0
    token = nearest.masked_fill_(gone, -torch.inf).argmax(1)
    gap = none.masked_fill_(gone, -torch.inf)
    chosen = []
    for _ in range(steps):
        chosen.append(token)
        torch.minimum(gap, from_token(token), out=gap)
        gap.scatter_(1, token.unsqueeze(1), -torch.inf)  # below all others: not chosen again among equal tokens
        token = gap.argmax(1)
    if not chosen:
        return torch.zeros(batch, 0, dtype=torch.int64, device=device)
    order = torch.stack(chosen, dim=1)
    return torch.where(torch.arange(steps, device=device) < wanted.unsqueeze(1), order, -1)
