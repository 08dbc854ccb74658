"""Super tokens: a soft, local clustering of a map of pixels, as in superpixel segmentation (arXiv 2211.11167).

The map is cut into cells. Each cell starts a super token with its mean; each pixel then divides itself between the
super tokens of its own cell and the eight around it, by a softmax over their similarities, and the super tokens become
the weighted means. That is sparse: 9 numbers a pixel, whatever the size of the map.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.tokenmap import TokenMap

Cell = tuple[int, int]


def pad_to_cells(x: Tensor, cell: Cell, mode: str = "constant") -> Tensor:
    """``x`` ``(batch, channels, height, width)``, longer on the right and below until whole cells fit."""
    missing = (-x.shape[-1] % cell[1], -x.shape[-2] % cell[0])
    return pad(x, (0, missing[0], 0, missing[1]), mode=mode) if any(missing) else x


def super_tokens(x: Tensor, cell: Cell, iterations: int = 1) -> tuple[Tensor, Tensor]:
    """Sample super tokens from a map of whole cells.

    Args:
        x: ``(batch, channels, height, width)``; height and width are multiples of the ``cell``'s.
        cell: ``(height, width)`` of a cell in pixels.
        iterations: rounds of assigning the pixels and averaging them.

    Returns:
        The super tokens ``(batch, channels, rows, columns)``, and the association ``(batch, cells, cell area, 9)``: how
        a pixel divides itself between the 3 x 3 super tokens around its cell. Neighbours outside the map are zero
        vectors, which take their part of the softmax too. Gradients flow through the pixels, not the association.
    """
    rows, columns = x.shape[-2] // cell[0], x.shape[-1] // cell[1]
    near, pixels = _near(rows, columns, x.device), _by_cell(x, cell)
    association = _associate(pixels, near, iterations)
    tokens = _means(pixels, association, near)
    return tokens.transpose(1, 2).view(len(x), -1, rows, columns), association


def associate(x: Tensor, cell: Cell, iterations: int = 1) -> Tensor:
    """The association alone, as :func:`super_tokens` gives it, without the averages of the last round."""
    near = _near(x.shape[-2] // cell[0], x.shape[-1] // cell[1], x.device)
    return _associate(_by_cell(x, cell), near, iterations)


@torch.no_grad()  # the association has none, and so neither have the super tokens that lead to it
def _associate(pixels: Tensor, near: Tensor, iterations: int) -> Tensor:
    def compare(tokens: Tensor) -> Tensor:
        similar = pixels @ _around(tokens, near).transpose(-1, -2)
        return torch.softmax(similar * pixels.shape[-1] ** -0.5, -1)

    association = compare(pixels.mean(2))
    for _ in range(iterations - 1):
        association = compare(_means(pixels, association, near))
    return association


def _means(pixels: Tensor, association: Tensor, near: Tensor) -> Tensor:
    """The super tokens ``(batch, cells, channels)``."""
    given = association.transpose(-1, -2)
    return _gather_in(given @ pixels, near) / (_gather_in(given.sum(-1, keepdim=True), near) + 1e-12)


def spread(tokens: Tensor, association: Tensor, cell: Cell) -> Tensor:
    """Super tokens ``(batch, channels, rows, columns)`` back to pixels, each the mix that its association says."""
    batch, channels, rows, columns = tokens.shape
    near = _near(rows, columns, tokens.device)
    pixels = association @ _around(tokens.flatten(2).transpose(1, 2), near)
    pixels = pixels.view(batch, rows, columns, *cell, channels)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * cell[0], columns * cell[1])


def association_map(association: Tensor, frames: int, height: int, width: int, cell: Cell, prefix: int = 0) -> TokenMap:
    """The TokenMap from pixels (in rows, behind a prefix that stays) to super tokens.

    A pixel's mass goes to the super tokens inside the map only, so all of it arrives: sizes sum to the pixels. Those
    that padding added have none. Where the softmax rounds everything to zero, a pixel belongs to its own cell, and a
    super token is the plain mean of its own cell.

    Args:
        association: ``(batch * frames, cells, cell area, 9)`` of the padded map.
        frames: maps that stand one behind the other in a row of tokens.
        height, width: of the map before padding.
        cell: ``(height, width)`` of a cell.
        prefix: tokens in front that keep an output each.
    """
    device, tiny = association.device, torch.finfo(torch.float32).tiny
    rows, columns = -(-height // cell[0]), -(-width // cell[1])
    pixel, token = _places(height, width, cell, device)
    real = (pixel >= 0) & (token >= 0)
    home = torch.zeros(9, device=device)
    home[4] = 1

    share = association.to(torch.float32) * real
    total = share.sum(-1, keepdim=True)
    share = torch.where(total < tiny, home * real, share / total.clamp(min=tiny))

    # Edges: the prefix tokens', then of every pixel those to its 3 x 3 super tokens.
    frame = torch.arange(frames, device=device).view(-1, 1, 1, 1)
    source = (prefix + frame * height * width + pixel).expand(-1, *real.shape)
    target = (prefix + frame * rows * columns + token).expand(-1, *real.shape)
    ones, batch = torch.arange(prefix, device=device), len(association) // frames
    source = torch.cat([ones, torch.where(real, source, 0).flatten()]).expand(batch, -1)
    target = torch.cat([ones, torch.where(real, target, -1).flatten()]).expand(batch, -1)

    def edges(values: Tensor) -> Tensor:
        return torch.cat(
            [values.new_ones(batch, prefix), values.expand(len(association), *real.shape).reshape(batch, -1)], 1
        )

    n_out = prefix + frames * rows * columns
    slot = torch.where(target >= 0, target, n_out)

    def of_target(values: Tensor) -> Tensor:
        return values.new_zeros(batch, n_out + 1).scatter_add_(1, slot, values).gather(1, slot)

    share = edges(share)
    weight = torch.where(of_target(share) < tiny, edges(home * real), share)
    weight = weight / of_target(weight).clamp(min=tiny)
    return TokenMap(source, target, weight, n_in=prefix + frames * height * width, n_out=n_out, share=share)


def _places(height: int, width: int, cell: Cell, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pixels of every cell ``(cells, cell area, 1)`` and its 3 x 3 super tokens ``(cells, 1, 9)``; -1 = outside."""

    def axis(size: int, length: int) -> tuple[Tensor, Tensor]:
        first = torch.arange(0, length, size, device=device).unsqueeze(1)
        pixel = first + torch.arange(size, device=device)
        near = first // size + torch.arange(-1, 2, device=device)
        return pixel.where(pixel < length, -1), near.where(near < len(first), -1)

    (y, up), (x, left) = axis(cell[0], height), axis(cell[1], width)

    def pairs(down: Tensor, across: Tensor, length: int) -> Tensor:
        down, across = down[:, None, :, None], across[None, :, None, :]
        return torch.where((down < 0) | (across < 0), -1, down * length + across).flatten(2).flatten(0, 1)

    return pairs(y, x, width).unsqueeze(2), pairs(up, left, len(left)).unsqueeze(1)


def _by_cell(x: Tensor, cell: Cell) -> Tensor:
    """``(batch, channels, height, width)`` to ``(batch, cells, cell area, channels)``."""
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height // cell[0], cell[0], width // cell[1], cell[1])
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, cell[0] * cell[1], channels)


def _near(rows: int, columns: int, device: torch.device) -> Tensor:
    """The 3 x 3 cells around each, ``(cells, 9)``; places outside the map have the number of cells as theirs."""
    near = _places(rows, columns, (1, 1), device)[1].squeeze(1)
    return torch.where(near < 0, rows * columns, near)


def _around(tokens: Tensor, near: Tensor) -> Tensor:
    """The neighbours of every super token ``(batch, cells, c)``: ``(batch, cells, 9, c)``; zero outside the map."""
    return pad(tokens, (0, 0, 0, 1))[:, near]


def _gather_in(parts: Tensor, near: Tensor) -> Tensor:
    """Sum what every cell sends to its neighbours: ``(batch, cells, 9, c)`` to ``(batch, cells, c)``."""
    sent = near * 9 + torch.arange(8, -1, -1, device=near.device)  # I am to its left, it is to my right
    return pad(parts.flatten(1, 2), (0, 0, 0, 9))[:, sent].sum(2)
