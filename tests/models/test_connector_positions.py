"""Positions of what is left, by policy."""

from __future__ import annotations

import torch

from tokenthrift.models.connector_positions import Run, drop_positions

NONE = torch.zeros(1, dtype=torch.int64)


def dropped(positions, kept, runs=(), policy="gapless", shift=0, gone=0, real=None):
    kept = torch.tensor(kept).bool()[None]
    real = torch.ones_like(kept) if real is None else torch.tensor(real).bool()[None]
    at, shift, gone = drop_positions(positions, kept, real, runs, NONE + shift, NONE + gone, policy)
    return at[..., 0, :][..., kept[0]].tolist(), int(shift), int(gone)


def test_one_axis():
    positions = torch.tensor([[0, 0, 1, 2, 3, 4]])  # a row padded on its left
    kept, real = [0, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 1]
    assert dropped(positions, kept, real=real) == ([0, 1, 2], 2, 2)
    assert dropped(positions, kept, real=real, policy="original") == ([0, 2, 4], 0, 2)
    assert dropped(positions + 20, kept, real=real, shift=5, gone=5) == ([15, 16, 17], 7, 7)


def test_axes_of_an_image():
    """Text, an image of 2 x 3 tokens, text: the first column of the image goes, then also a row."""
    axes = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 4, 5], [0, 1, 1, 1, 2, 2, 2, 4, 5], [0, 1, 2, 3, 1, 2, 3, 4, 5]])[
        :, None
    ]
    runs = [Run(0, 1, 7)]
    at, shift, gone = dropped(axes, [1, 0, 1, 1, 0, 1, 1, 1, 1], runs)
    assert at == [[0, 1, 1, 1, 1, 3, 4], [0, 1, 1, 2, 2, 3, 4], [0, 1, 2, 1, 2, 3, 4]]
    assert (shift, gone) == (1, 2)
    at, shift, gone = dropped(axes, [1, 0, 0, 0, 0, 0, 1, 1, 1], runs)
    assert at == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]] and (shift, gone) == (2, 5)
    four = torch.cat([torch.arange(9)[None, None], axes])
    at, shift, _ = dropped(four, [1, 0, 0, 0, 0, 0, 1, 1, 1], runs, policy="original")
    assert at == [[0, 1, 2, 3], [0, 1, 4, 5], [0, 2, 4, 5], [0, 3, 4, 5]] and shift == 0


def test_steps_in_time_stay_those_of_the_video():
    """Three frames of one row and two columns, 50 apart: without the second one the third is 50 after the first."""
    time, wide = [0, 0, 50, 50, 100, 100, 2, 3], [0, 1, 0, 1, 0, 1, 2, 3]
    axes = torch.tensor([time, [0] * 6 + [2, 3], wide])[:, None]
    at, shift, _ = dropped(axes, [1, 1, 0, 0, 1, 1, 1, 1], [Run(0, 0, 6)])
    assert at == [[0, 0, 50, 50, 2, 3], [0, 0, 0, 0, 2, 3], [0, 1, 0, 1, 2, 3]] and shift == 0
