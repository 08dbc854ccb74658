"""Bin packing: sequences of many lengths into few rows of bounded length."""

from __future__ import annotations

from collections.abc import Sequence


def pack_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which sequences share a row: longest first, each into the emptiest row that has room, else into a new one.

    Args:
        lengths: of the sequences.
        capacity: of a row; a sequence that is longer has a row of its own.

    Returns:
        Of each row the sequences' indices, in the order of their placing.
    """
    bins: list[list[int]] = []
    loads: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = [b for b, load in enumerate(loads) if load + lengths[index] <= capacity]
        if room:
            emptiest = min(room, key=lambda b: loads[b])
            bins[emptiest].append(index)
            loads[emptiest] += lengths[index]
        else:
            bins.append([index])
            loads.append(lengths[index])
    return bins
