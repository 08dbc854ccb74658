"""GOOSE's tree: a deep spine, and branches that are wide near the root."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import ceil

from ..core.draft import ROOT
from .spine import Successors

FAR = 100
"""Nodes at most, where the spine is sure."""
_UNLIKELY = 0.01  # score below which no branch is made
_ALONG = 0.5  # share of the branches that hang on the spine, not on the root


def grow(
    successors: Successors,
    last: tuple[int | None, int],
    chain: Sequence[int],
    confidence: float,
    accepted: float,
    nodes: int = 60,
    depth: int = 6,
) -> tuple[list[int], list[int], list[float], int]:
    """The tree: tokens, parents, scores of the branches, and the number of nodes that are spine, which come first.

    Args:
        last: the last two tokens.
        chain: the copy, which the spine is the beginning of.
        confidence: how sure the copy is.
        accepted: the share of spines that was accepted of late.
        nodes, depth: see :class:`tokenthrift.decoding.goose.Goose`.
    """
    nodes += int(confidence * max(0, FAR - nodes))
    ratio = 0.15 if accepted < 0.2 else 0.3 if accepted < 0.4 else 0.5
    spine = min(len(chain), int(nodes * (ratio + confidence * (1 - ratio))))
    tokens, parents, scores = list(chain[:spine]), list(range(ROOT, spine - 1)), [1.0] * spine
    depths = list(range(1, spine + 1))
    growing: deque[tuple[int, float]] = deque()

    def token_of(node: int) -> int:
        return last[1] if node == ROOT else tokens[node]

    def following(node: int) -> list[tuple[int, float]]:
        return successors(last[0] if node == ROOT else token_of(parents[node]), token_of(node))

    def attach(node: int, guesses: Sequence[tuple[int, float]], most: int) -> int:
        made = 0
        for token, score in guesses[:most]:
            if score < _UNLIKELY:
                break
            depths.append(1 if node == ROOT else depths[node] + 1)
            if depths[-1] < depth:
                growing.append((len(tokens), score))
            tokens.append(token)
            parents.append(node)
            scores.append(score)
            made += 1
        return made

    branches = max(nodes - 1 - spine, 0)
    along = max(1, int(branches * _ALONG)) if spine and branches else 0
    attach(ROOT, [(t, s) for t, s in following(ROOT) if [t] != list(chain[:1])], branches - along)
    for node, width in enumerate(_harmonic(along, spine)):
        attach(node, [(t, s) for t, s in following(node) if [t] != tokens[node + 1 : min(node + 2, spine)]], width)
    left = nodes - 1 - len(tokens)
    while growing and left > 0:
        node, score = growing.popleft()
        guesses = following(node)
        width = min(max(1, min(len(guesses), ceil(left * score))), max(1, successors.k // depths[node]), left)
        left -= attach(node, guesses, width)
    return tokens, parents, scores, spine


def _harmonic(count: int, places: int) -> list[int]:
    """``count`` children over the places, in shares of 1, 1/2, 1/3, ..., one each at least while there are some."""
    total, shares, left = sum(1 / (i + 1) for i in range(places)), [], count
    for i in range(places):
        shares.append(min(max(1, int(count / (i + 1) / total)), left))
        left -= shares[-1]
    return shares
