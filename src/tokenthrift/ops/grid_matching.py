"""Matching with given destinations: every token is told in advance whether it may receive or has to give.

Bipartite soft matching (``matching.py``) alternates givers and receivers along the sequence. On a grid of patches one
receiver in each cell of, say, 2 x 2 patches spreads the receivers evenly, and a random place in the cell avoids the
stripes that a fixed one leaves in the output (arXiv 2303.17604, section 4.2).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core.errors import ThriftError
from .matching import Groups


def match_to(
    metric: Tensor, receives: Tensor, r: int, protected: Tensor | None = None, chunk: int = 4096
) -> Groups | None:
    """Merge the ``r`` giving tokens that are most like a receiving one, each into the one that it resembles most.

    Survivors keep their order (the authors' codes put the givers that are left first, then the receivers).

    Args:
        metric: ``(batch, tokens, dim)`` what is compared, by cosine similarity in float32.
        receives: ``(tokens,)`` bool, the receivers; all others give. One partition for the whole batch.
        r: tokens to remove per row, clipped to the number of givers.
        protected: ``(tokens,)`` bool, tokens that do not give; those that receive still do.
        chunk: givers that are compared at a time, so that memory stays ``chunk x receivers`` however long the video.

    Returns:
        The groups, or None when nothing can be merged. All rows remove the same number of tokens.
    """
    tokens = metric.shape[1]
    gives = ~receives if protected is None else ~receives & ~protected
    giver, receiver = gives.nonzero().squeeze(-1), receives.nonzero().squeeze(-1)
    r = min(r, giver.numel()) if receiver.numel() else 0
    if r <= 0:
        return None
    metric = normalize(metric.to(torch.float32), dim=-1)
    into = metric[:, receiver].transpose(-1, -2)
    found = [(metric[:, part] @ into).max(-1) for part in torch.split(giver, chunk)]
    best, partner = torch.cat([f.values for f in found], 1), torch.cat([f.indices for f in found], 1)
    chosen = best.argsort(dim=-1, descending=True, stable=True)[:, :r]
    return Groups.of_pairs(giver[chosen], receiver[partner.gather(1, chosen)], tokens)


def one_per_cell(draw: Tensor, height: int, width: int, cell: tuple[int, int]) -> Tensor:
    """The patches that a draw picks: ``(..., height * width)`` bool.

    Args:
        draw: ``(..., height // cell height, width // cell width)`` int64, the place in each cell, counted along its
            rows. Patches outside the last full cells are not picked.
        height, width: of the grid of patches.
        cell: ``(height, width)`` of a cell.
    """
    high, wide = cell
    *lead, rows, columns = draw.shape
    picked = torch.zeros(*lead, rows, columns, high * wide, dtype=torch.bool, device=draw.device)
    picked = picked.scatter_(-1, draw.unsqueeze(-1), True).view(*lead, rows, columns, high, wide)
    grid = torch.zeros(*lead, height, width, dtype=torch.bool, device=draw.device)
    grid[..., : rows * high, : columns * wide] = picked.transpose(-3, -2).reshape(*lead, rows * high, columns * wide)
    return grid.flatten(-2)


def draw_cells(frames: int, height: int, width: int, cell: tuple[int, int], seed: int | None) -> Tensor:
    """A place in every cell of every frame, ``(frames, height // cell height, width // cell width)``.

    Drawn by a generator of its own, on the CPU: the user's random numbers stay as they were, and every device draws the
    same. ``seed=None`` takes the first place (top left) of each cell.
    """
    high, wide = cell
    shape = (frames, height // high, width // wide)
    if seed is None:
        return torch.zeros(shape, dtype=torch.int64)
    return torch.randint(high * wide, shape, generator=torch.Generator().manual_seed(seed))


def patch_index(tokens: int, grid: tuple[int, int, int], prefix: int) -> Tensor:
    """Where the patches of each frame stand among the tokens: ``(frames, height * width)`` int64.

    The ``prefix`` tokens stand either once, in front, or in front of the patches of every frame (which of the two,
    follows from the number of ``tokens``).

    Raises:
        ThriftError: the tokens are not this grid of patches: another method has reduced them before.
    """
    frames, height, width = grid
    area = height * width
    if tokens == prefix + frames * area:
        return prefix + torch.arange(frames * area).view(frames, area)
    if tokens == frames * (prefix + area):
        return (torch.arange(tokens).view(frames, prefix + area))[:, prefix:]
    raise ThriftError(
        f"{tokens} tokens are not a grid of {frames} x {height} x {width} patches with {prefix} tokens in front: "
        "methods that work on the grid take whole images, put no other reduction before them"
    )
