"""Super tokens: a soft, local clustering of a map of pixels, as in superpixel segmentation (arXiv 2211.11167).

The map is cut into cells. Each cell starts a super token with its mean; each pixel then divides itself between the
super tokens of its own cell and the eight around it, by a softmax over their similarities, and the super tokens become
the weighted means. That is sparse: 9 numbers a pixel, whatever the size of the map.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, fold, pad, unfold

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
    channels, height, width = x.shape[1:]
    rows, columns = height // cell[0], width // cell[1]
    pixels = _by_cell(x, cell)
    tokens = avg_pool2d(x, cell)
    for left in reversed(range(max(iterations, 1))):
        with torch.no_grad():
            association = (pixels @ _around(tokens) * channels**-0.5).softmax(-1)
        # Only the last round's super tokens are wanted with a gradient: the others end in the association.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not left):
            total = _gather_in(pixels.transpose(-1, -2) @ association, rows, columns)
            mass = _gather_in(association.sum(-2, keepdim=True), rows, columns)
            tokens = total / (mass + 1e-12)
    return tokens, association


def spread(tokens: Tensor, association: Tensor, cell: Cell) -> Tensor:
    """Super tokens ``(batch, channels, rows, columns)`` back to pixels, each the mix that its association says."""
    batch, channels, rows, columns = tokens.shape
    pixels = association @ _around(tokens).transpose(-1, -2)
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


def _around(tokens: Tensor) -> Tensor:
    """The 3 x 3 neighbours of every super token: ``(batch, cells, channels, 9)``; zero outside the map."""
    batch, channels = tokens.shape[:2]
    return unfold(tokens, 3, padding=1).view(batch, channels, 9, -1).permute(0, 3, 1, 2)


def _gather_in(parts: Tensor, rows: int, columns: int) -> Tensor:
    """Sum what every cell sends to its 3 x 3 neighbours: ``(batch, cells, c, 9)`` to ``(batch, c, rows, columns)``."""
    batch, _, channels, _ = parts.shape
    return fold(parts.permute(0, 2, 3, 1).reshape(batch, channels * 9, -1), (rows, columns), 3, padding=1)
