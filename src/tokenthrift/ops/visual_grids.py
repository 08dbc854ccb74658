"""Grids of visual tokens, divided evenly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..core.budget import Budget, share_out
from ..core.view import Segment


def spread(total: int, parts: int) -> list[int]:
    """``total`` over ``parts`` as evenly as integers allow, the larger ones between the smaller ones."""
    return [(i + 1) * total // parts - i * total // parts for i in range(parts)]


def share_frames(budget: Budget, segments: Sequence[Segment]) -> Iterator[tuple[Segment, Tensor, int]]:
    """How many tokens each frame keeps, in all what the budget says: segments in proportion to their size, the frames
    of one evenly. Yields its segment, its tokens' numbers ``(h·w,)``, and how many of them are kept."""
    sizes = [s.size for s in segments]
    counts = share_out(budget.tokens(sum(sizes)), sizes, caps=sizes)
    for segment, count in zip(segments, counts, strict=True):
        frames = segment.numbers().view(segment.t, -1)
        for frame, of_frame in zip(frames, spread(count, segment.t), strict=True):
            yield segment, frame, of_frame


def cells(h: int, w: int, count: int) -> tuple[Tensor, Tensor]:
    """Divide a grid into exactly so many cells, about as high as wide: bands of rows, each cut into equal parts.

    Where rows and columns divide evenly these are the windows of average pooling.

    Returns:
        ``(h·w,)`` int64, the cell of each token, and ``(count,)`` int64, the token in the middle of each cell.
    """
    bands = min(max(round((count * h / w) ** 0.5), -(-count // w), 1), h, count)
    group = torch.empty(h, w, dtype=torch.int64)
    middle, first = [], 0
    for band, of_band in enumerate(spread(count, bands)):
        top, bottom = band * h // bands, (band + 1) * h // bands
        for cell in range(of_band):
            left, right = cell * w // of_band, (cell + 1) * w // of_band
            group[top:bottom, left:right] = first + cell
            middle.append((top + bottom - 1) // 2 * w + (left + right - 1) // 2)
        first += of_band
    return group.flatten(), torch.tensor(middle)


def beside_segments(segments: Sequence[Segment], n: int) -> Tensor:
    """``(n,)`` bool: tokens that no segment has."""
    out = torch.ones(n, dtype=torch.bool)
    for segment in segments:
        out[segment.numbers()] = False
    return out
