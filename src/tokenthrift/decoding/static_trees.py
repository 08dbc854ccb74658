"""The best static tree of guesses, by how often the first, second, ... guess at a place is right: Sequoia's search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from ..core.errors import ThriftError


def best_tree(
    rates: Sequence[float], times: Mapping[int, float], *, depth: int, draft_time: float = 0.0
) -> list[list[int]]:
    """The tree that brings the most tokens a second, as the children of every node, the root being node 0.

    Dynamic programming over all trees (Sequoia, arXiv 2402.12374, section 3.1): a tree whose root has b children is one
    with b - 1 and a further child with a best tree of its own, one level lower. A tree of n nodes, the root included,
    brings on average the sum, over its nodes, of the product of the rates on the way there.

    Args:
        rates: of the first, second, ... child of a node, the chance to be the right one.
        times: seconds of a forward by nodes in it, the root included: the sizes to choose from.
        depth: levels at most, the root included.
        draft_time: seconds that one level of drafting takes.

    Returns:
        Nodes in breadth-first order.

    Raises:
        ThriftError: rates that are no chances, or sizes that no tree has.
    """
    if not rates or not all(0 < rate <= 1 for rate in rates):
        raise ThriftError(f"the best tree is searched from rates above 0 and at most 1, not {list(rates)!r}")
    if depth < 1 or not times or min(times) < 1:
        raise ThriftError("the best tree has at least one node and one level")
    values, splits = _search(tuple(rates), max(times), depth)
    best = values.max(axis=2)
    costs = {
        (nodes, levels): (levels * draft_time + seconds) / best[nodes, levels]
        for nodes, seconds in times.items()
        for levels in range(1, depth + 1)
        if best[nodes, levels] > 0
    }
    if not costs:
        raise ThriftError(f"no tree of {depth} levels and {len(rates)} children a node has {list(times)} nodes")
    nodes, levels = min(costs, key=lambda size: costs[size])
    # From the sizes of the subtrees to the nodes, level by level.
    queue, children = [(nodes, levels)], [[]]  # type: ignore[var-annotated]
    for node, (nodes, levels) in enumerate(queue):  # the queue grows meanwhile
        for size in _subtrees(values, splits, nodes, levels):
            children[node].append(len(queue))
            children.append([])
            queue.append((size, levels - 1))
    return children


def levels_of(children: Sequence[Sequence[int]]) -> list[list[int]]:
    """Level by level, how many children each node has, the root first; without the last, which has none."""
    out, level = [], [0]
    while any(children[node] for node in level):
        out.append([len(children[node]) for node in level])
        level = [child for node in level for child in children[node]]
    return out


@lru_cache(maxsize=32)
def _search(rates: tuple[float, ...], most: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """``values[nodes, levels, children of the root]``: tokens of the best such tree; and the nodes of it that are not
    in the last child's subtree."""
    values = np.full((most + 1, depth + 1, len(rates) + 1), -np.inf)
    splits = np.zeros(values.shape, dtype=int)
    values[1, 1:, 0] = 1
    best = values.max(axis=2)
    for nodes in range(2, most + 1):
        for levels in range(2, depth + 1):
            for b, rate in enumerate(rates, start=1):
                sums = values[1:nodes, levels, b - 1] + rate * best[nodes - 1 : 0 : -1, levels - 1]
                splits[nodes, levels, b] = 1 + int(sums.argmax())
                values[nodes, levels, b] = sums.max()
            best[nodes, levels] = values[nodes, levels].max()
    return values, splits


def _subtrees(values: np.ndarray, splits: np.ndarray, nodes: int, levels: int) -> list[int]:
    """Sizes of the subtrees of the root's children, the first first."""
    sizes: list[int] = []
    for b in range(int(values[nodes, levels].argmax()), 0, -1):
        rest = int(splits[nodes, levels, b])
        sizes.insert(0, nodes - rest)
        nodes = rest
    return sizes
