"""Token-level compression in steps, each step reading what the steps before it left (LLMLingua, arXiv 2310.05736).

Two versions. :func:`margins` is the paper's: a token is judged by its own surprise, in a threshold of its own segment.
:func:`authors_kept` makes the decisions of the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Surprise = Callable[[list[int], int], Tensor]
"""``(ids, last)`` to ``-ln p`` of the last so many of the ids, or to what else makes a token worth keeping."""


def margins(ids: Sequence[int], rates: Sequence[float], units: Sequence[int], size: int, surprise: Surprise) -> Tensor:
    """How far the score of each token is above the threshold of its segment: what is above 0 is kept.

    A segment is read behind what was kept of the segments before it. Its threshold is the quantile of its own scores
    that leaves the share ``rate``. The tokens of a unit have one score, their mean, so that none is kept in part.

    Args:
        ids: the tokens of the text.
        rates: the share to keep around each token; tokens with 1 are always kept, and count for no threshold.
        units: the unit of each token, ascending.
        size: tokens of a segment; its last unit is never cut, and the last segment has up to half as many more.
        surprise: the scores of the last tokens of a text.
    """
    out = torch.empty(len(ids))
    share, unit = torch.tensor(rates), torch.tensor(units)
    kept: list[int] = []
    start = 0
    while start < len(ids):
        end = start + size
        if len(ids) - end < size // 2:  # a rest would cost reading all that was kept once more
            end = len(ids)
        while end < len(ids) and units[end] == units[end - 1]:
            end += 1
        segment = list(ids[start:end])
        score = surprise(kept + segment, end - start)
        _, group = unit[start:end].unique_consecutive(return_inverse=True)
        total = torch.zeros(int(group[-1]) + 1).scatter_reduce(0, group, score, "mean", include_self=False)
        margin = above_quantile(total[group], share[start:end])
        out[start:end] = margin
        kept += [i for i, keep in zip(segment, (margin > 0).tolist(), strict=True) if keep]
        start = end
    return out


def above_quantile(score: Tensor, share: Tensor) -> Tensor:
    """``score`` less the quantile that leaves each token's share above it; infinite where all are to be kept."""
    counted = score[share < 1]
    out = torch.full_like(score, torch.inf)
    for rate in share[share < 1].unique().tolist():
        here = share == rate
        out[here] = score[here] - torch.quantile(counted, 1 - rate)
    return out


# ---- as the authors' code does it -----------------------------------------------------------------------------------


def authors_schedule(
    lengths: Sequence[int], target: float, size: int, changes: Sequence[float]
) -> list[list[tuple[int, float]]]:
    """The segments, each a list of ``(tokens, rate)``: the parts of documents that fall into it.

    Args:
        lengths: tokens of each document, each with two more for the separator.
        target: tokens to keep.
        size: tokens of a segment.
        changes: what is added to the rate of each document.
    """
    base = target / (sum(lengths) + 1)
    schedule: list[list[tuple[int, float]]] = []
    part: list[tuple[int, float]] = []
    filled = 1
    for length, change in zip(lengths, changes, strict=True):
        rate = max(min(1, base + change), 0)
        if filled + length < size:
            filled += length
            part.append((length, rate))
            continue
        schedule.append([*part, (size - filled, rate)])
        filled += length - size
        if filled > size:
            schedule += [[(size, rate)]] * (filled // size)
            filled %= size
        part = [(filled, rate)] if filled else []
    return [*schedule, part] if part else schedule


def authors_threshold(score: Tensor, rate: float) -> float:
    """The score that is to be exceeded, taken from the sorted scores; minus infinity for a rate of 1."""
    if rate == 1:
        return -torch.inf
    at = max(0, min(len(score) - 1, int(len(score) * rate) - 1))
    return float(score.sort(descending=True).values[at])


def authors_kept(
    ids: Sequence[int],
    schedule: Sequence[Sequence[tuple[int, float]]],
    size: int,
    surprise: Surprise,
    *,
    start: int = 0,
    alone: Surprise | None = None,
    keep: Sequence[bool] | None = None,
) -> list[int]:
    """Which tokens the authors' code keeps, with what is peculiar to it.

    The token *before* an unsurprising one is dropped, as the mask is not shifted; the threshold is taken over the
    scores of the whole text, those of later segments as of the first pass; and of texts shorter than ``size``, as of
    the end of all, little or nothing is dropped, since a negative index counts from the end.

    Args:
        ids: the tokens, after ``start`` tokens of a question.
        schedule: what :func:`authors_schedule` gives.
        surprise: ``-ln p`` of the last tokens of a text.
        alone: the same without the question: the score is then the difference (LongLLMLingua's contrast).
        keep: true for tokens that are kept whatever their score.
    """
    ids, left, always = list(ids), list(range(len(ids))), None if keep is None else torch.tensor(keep)
    loss = own = torch.zeros(0)
    end = min(size + start, len(ids))
    ready = 0
    for step, parts in enumerate(schedule):
        if end > len(ids) or len(ids) < 2:
            break
        if step == 0:
            loss = surprise(ids, len(ids) - 1)
            own = alone(ids[start:], len(ids) - start - 1) if alone else own
        else:
            loss = torch.nn.functional.pad(loss, (0, max(end - 1 - len(loss), 0)))
            loss[ready : end - 1] = surprise(ids[:end], end - 1 - ready)
            if alone:
                since = max(ready - start, 0)
                own[since : end - start - 1] = alone(ids[start:end], end - start - 1 - since)
        ready = end - size if step or not start else 0
        for length, rate in parts:
            # Entry i scores token i + 1, but decides on token i. The last token has no entry and stays.
            score = own - loss[start:] if alone else loss
            above = torch.cat(
                [torch.ones(start if alone else 0), score > authors_threshold(score, rate), torch.ones(1)]
            )
            mask = above.bool()
            end = int(end - size + length)
            mask[end:] = True
            mask[: end - int(length)] = True
            loss = loss[mask[:-1]]
            own = own[mask[start:-1]] if alone else own
            mask = torch.nn.functional.pad(mask, (0, len(ids) - len(mask)), value=True)
            if always is not None:
                mask |= always
                always = always[mask]
            ids = [i for i, m in zip(ids, mask.tolist(), strict=True) if m]
            left = [i for i, m in zip(left, mask.tolist(), strict=True) if m]
            end += size - int((~mask[:end]).sum())
    return [i - start for i in left[start:]]
