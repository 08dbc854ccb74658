"""Which words of a text stayed in its shortened version, though the teacher may have changed some, or their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Alignment:
    """The words of a text, and how well its shortened version fits to them.

    Attributes:
        labels: true for the words that stayed.
        variation_rate: share of the shortened version's words that the text does not have.
        hitting_rate: those that it has, to the number of words of the text.
        matching_rate: share of the text's words that were found again, in about the right place.
        alignment_gap: hitting rate less matching rate: words that exist but were not found.
    """

    labels: list[bool]
    variation_rate: float
    hitting_rate: float
    matching_rate: float

    @property
    def alignment_gap(self) -> float:
        return self.hitting_rate - self.matching_rate


def align(
    original: Sequence[str], compressed: Sequence[str], window: int = 150, same: Callable[[str], str] = str.lower
) -> Alignment:
    """Find every word of the shortened version near to where the last one was found.

    The search goes one step forward, one backward, and so on, up to ``window`` steps, to the first equal word that is
    not taken. Far jumps forward only count for half a window, so that one wrong match does not lose the rest.

    Args:
        original, compressed: words. (The authors compare lemmas, without commas, which texts at run time are not.)
        window: 150 is the authors' default, 400 their setting for meetings.
        same: words are equal if this is.
    """
    words, last = [same(word) for word in original], len(original) - 1
    labels = [False] * len(words)
    there, hits, at = set(words), 0, 0
    for word in map(same, compressed):
        if word not in there:
            continue
        hits += 1
        for step in range(window):
            ahead, back = min(at + step, last), max(at - step, 0)
            if words[ahead] == word and not labels[ahead]:
                labels[ahead] = True
                at = at + window // 2 if ahead - at > window // 2 else ahead
                break
            if words[back] == word and not labels[back]:
                labels[back] = True
                at = back
                break
    n = max(len(words), 1)
    variation = 1 - hits / len(compressed) if compressed else 1.0
    return Alignment(labels, variation, hits / n, sum(labels) / n)
