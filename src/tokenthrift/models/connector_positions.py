"""The language model's positions of the tokens that are left, by policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POLICIES = ("gapless", "original")


@dataclass(frozen=True)
class Run:
    """Columns of one image that follow each other in a row of the prompt."""

    row: int
    start: int
    end: int


def drop_positions(
    positions: Tensor, kept: Tensor, real: Tensor, runs: Sequence[Run], shift: Tensor, gone: Tensor, policy: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of all columns as those that are kept have them, and what later ones are lowered by.

    ``"original"``: as they are. ``"gapless"``, for positions ``(batch, n)``: lowered by the number of dropped tokens
    before, so that they are consecutive where they were. For ``(3, batch, n)`` (time, height, width of multimodal
    RoPE): in each run of an image, and for each axis apart, a value that no kept token has is taken out, together with
    the step from it to the run's next value; the tokens after the run are lowered by as much as the larger of its
    height and width has shrunk. A text token keeps one position on all axes. In ``(4, batch, n)`` the first are those
    of the text, which only say which tokens belong together: they are always consecutive.

    Args:
        positions: as above.
        kept, real: ``(batch, n)`` bool, the columns that stay and those that are no padding.
        runs: in ascending order within a row; axes of ``(batch, n)`` do not look at them.
        shift, gone: ``(batch,)``, what the tokens before these columns have lost; see ``ConnectorCache``.
        policy: one of :data:`POLICIES`.

    Returns:
        The positions of all columns (those of dropped ones mean nothing), the new ``shift`` and the new ``gone``.
    """
    dropped = (real & ~kept).long()
    before = dropped.cumsum(1) - dropped + gone.unsqueeze(1)
    after = gone + dropped.sum(1)
    if positions.dim() == 2:
        if policy == "original":
            return positions, shift, after
        lost = dropped.cumsum(1) - dropped + shift.unsqueeze(1)
        return positions - lost, shift + dropped.sum(1), after
    axes = positions[-3:]
    if policy == "gapless":
        axes, shift = _close_axes(axes, kept, runs, shift)
    if positions.shape[0] == 4:
        axes = torch.cat([positions[:1] - before, axes])
    return axes, shift, after


def _close_axes(axes: Tensor, kept: Tensor, runs: Sequence[Run], shift: Tensor) -> tuple[Tensor, Tensor]:
    out, shift = axes.clone(), shift.clone()
    done = [0] * axes.shape[1]
    for run in runs:
        row, inside = run.row, slice(run.start, run.end)
        out[:, row, done[row] : run.end] -= shift[row]
        done[row] = run.end
        before, after = [], []
        for axis in range(3):
            values, which = axes[axis, row, inside].unique(return_inverse=True)
            steps = torch.ones_like(values)
            steps[:-1] = values.diff()
            there = torch.zeros_like(values).scatter_reduce_(0, which, kept[row, inside].to(values.dtype), "amax") > 0
            lost = steps.masked_fill(there, 0)
            out[axis, row, inside] -= (lost.cumsum(0) - lost)[which]
            before.append(int(steps.sum()))
            after.append(int(steps.sum() - lost.sum()))
        shift[row] += max(before[1:]) - max(after[1:])
    for row, end in enumerate(done):
        out[:, row, end:] -= shift[row]
    return out, shift
