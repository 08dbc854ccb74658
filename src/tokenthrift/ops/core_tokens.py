"""How many tokens each block of a text keeps, when the sizes 1, 2, 4, … are dealt out in a log-Gaussian way."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def block_shares(size: int, mean: Tensor, spread: float) -> Tensor:
    """The shares of blocks that keep 1, 2, 4, …, ``size`` tokens: a Gaussian of the logarithm of these numbers.

    (TCA-Attention, arXiv 2512.09238: the candidates for a head's budget.)

    Args:
        size: tokens in a block, a power of two.
        mean: ``(*)``, of the logarithm to base 2, any real number.
        spread: standard deviation of the logarithm.

    Returns:
        ``(*, log2(size) + 1)`` float64, summing to one.
    """
    logs = torch.arange(size.bit_length(), dtype=torch.float64)
    return (-((logs - mean.to(torch.float64).unsqueeze(-1)) ** 2) / (2 * spread**2)).softmax(-1)


@lru_cache(maxsize=8)
def block_order(blocks: int, size: int, spread: float) -> Tensor:
    """In which order blocks take tokens, as the mean of :func:`block_shares` rises and the spread stays.

    With each mean every block keeps at least what it kept with a smaller one, so that all means are cuts of one order:
    its first ``n`` entries are the tokens to keep, for any ``n``. Fewer tokens than blocks go to the first blocks.

    Args:
        blocks: their number.
        size, spread: as for :func:`block_shares`.

    Returns:
        ``(blocks, size)`` int64: when the block of this place (0 keeps most) takes its best, second best, … token.
    """
    levels = size.bit_length()
    # A block takes its tokens from 2^(e-1) to 2^e when the share of blocks that keep at least 2^e reaches its place.
    place = ((torch.arange(blocks, dtype=torch.float64) + 0.5) / blocks).unsqueeze(-1).expand(-1, levels - 1)
    reach = spread**2 * 40 + levels  # means far enough to either side for every place
    low, high = torch.full_like(place, -reach), torch.full_like(place, reach)
    for _ in range(48):
        middle = (low + high) / 2
        at_least = block_shares(size, middle, spread).flip(-1).cumsum(-1).flip(-1)[..., 1:]
        enough = at_least.diagonal(dim1=-2, dim2=-1) > place
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    begin = torch.full((blocks, 1), -2 * reach, dtype=torch.float64)
    level = torch.tensor([(rank).bit_length() for rank in range(size)])  # 0, 1, 2, 2, 3, 3, 3, 3, …
    moment = torch.cat([begin, high], dim=-1)[:, level]
    order = moment.T.flatten().argsort(dim=0, stable=True)  # of one moment: all second best before the third best
    return order.argsort().view(size, blocks).T.contiguous()


def core_scores(worth: Tensor, redundancy: Tensor, spread: float) -> Tensor:
    """Scores whose ``n`` highest are the core tokens of a head that keeps ``n``.

    Args:
        worth: ``(*, blocks, size)``, ranks the tokens of a block.
        redundancy: ``(*, blocks)``, the less the more tokens a block keeps.
        spread: see :func:`block_order`.

    Returns:
        ``(*, blocks, size)`` float32, whole numbers from ``1 - blocks * size`` to 0.
    """
    blocks, size = worth.shape[-2:]
    order = block_order(blocks, size, spread).to(worth.device)
    place = redundancy.argsort(dim=-1, stable=True).argsort(-1)
    rank = worth.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return -order[place.unsqueeze(-1), rank].to(torch.float32)
