"""From shortened texts to samples for training: every word with its label, and bad samples left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...core.errors import ThriftError
from ...ops.tokens import Span
from ..spans import words
from .align import Alignment, align


@dataclass(frozen=True)
class Sample:
    """A text with its words, labelled.

    Attributes:
        text: the original.
        spans: its words, as ``text.spans.words`` finds them: the same that ``llmlingua2`` chooses from.
        alignment: which of them the teacher kept, and how sure that is.
    """

    text: str
    spans: list[Span]
    alignment: Alignment

    @classmethod
    def of(cls, text: str, compressed: str, window: int = 150) -> Sample:
        """Label the words of ``text`` by its shortened version."""
        spans = words(text)
        kept = [compressed[a:b].strip() for a, b in words(compressed)]
        return cls(text, spans, align([text[a:b].strip() for a, b in spans], kept, window))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSONL."""
        return {"text": self.text, "labels": [int(label) for label in self.alignment.labels]}


def good_samples(samples: Sequence[Sample], variation: float = 0.9, gap: float = 0.9) -> list[Sample]:
    """Without those with the highest variation rate, and of the rest, those with the highest alignment gap.

    A high variation rate means that the teacher wrote words of its own, a high alignment gap that its words could not
    be found where they should be.

    Args:
        variation, gap: the quantile that a sample must be below (or, where all are equal, at). 0.9 twice is what the
            authors' code has.
    """
    for name, value in (("variation", variation), ("gap", gap)):
        if not 0 < value <= 1:
            raise ThriftError(f"the quantile {name}={value} is outside (0, 1]; 1.0 leaves nothing out")
    kept = _below(list(samples), [s.alignment.variation_rate for s in samples], variation)
    return _below(kept, [s.alignment.alignment_gap for s in kept], gap)


def _below(samples: list[Sample], rates: list[float], quantile: float) -> list[Sample]:
    if not samples or quantile == 1:
        return samples
    limit = np.percentile(rates, 100 * quantile)
    # Where the limit is the lowest rate of all, a strict comparison would leave nothing.
    return [s for s, rate in zip(samples, rates, strict=True) if rate < limit or rate == min(rates)]
