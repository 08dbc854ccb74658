"""DEL: self-speculation whose exit layer and draft length follow the context."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.errors import ThriftError
from ..core.method import method
from .early_exit import ExitDrafters, depth_of
from .protocols import Request


@method(
    "dynamic_exit",
    stage="decode",
    paper="DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding",
    arxiv="2504.05598",
    status="partial",
)
class DynamicExit:
    """Draft with the model's first layers, as many of them and as many tokens as promise most tokens per layer.

    While the model verifies, the outputs of its layers are read as if each were the last: these shadow tokens show how
    often every exit would have been right. Before each draft the exit e and the length d are chosen that maximise
    ``(1 - a^(d+1)) / (1 - a) / (d e + L)``, a being the exit's share of right tokens of late and L the number of
    layers. Where no exit promises more than plain decoding, nothing is drafted. A draft also ends at a guess of little
    confidence.

    Args:
        draft: guesses in a draft at most.
        exits: how many exits to choose from, evenly spaced; None takes all, as the paper does. Each costs a pass
            through the head for every token verified.
        decay: weight of a token in the estimates against the one after it.
        confidence: end drafts early. The threshold is half-way between the mean confidences of guesses that were
            accepted and of those that were rejected.

    Assumed, since the paper's constants were not at hand: the default of ``draft`` and of ``decay``, the form of the
    threshold, one miss as prior, pooling the rows of a batch. The cost of the head is counted, in layers, by its
    weights; the paper counts layers only. While nothing is drafted, shadow tokens are read ever more rarely, down to
    every 32nd step.

    Raises:
        ThriftError: a parameter outside its range; when generating, a model whose layers are not found, or a cache that
            cannot be packed.
    """

    draft: int = 8
    exits: int | None = 8
    decay: float = 0.95
    confidence: bool = True

    def __post_init__(self) -> None:
        if self.draft < 1 or (self.exits is not None and self.exits < 1):
            raise ThriftError("dynamic_exit needs draft and exits of at least 1")
        if not 0 < self.decay < 1:
            raise ThriftError(f"dynamic_exit needs decay between 0 and 1, not {self.decay!r}")

    def start_batch(self, prompts: Sequence[Sequence[int]], request: Request) -> ExitDrafters:
        """The drafters of a batch."""
        most = len(depth_of(request.model).layers) - 1
        count = most if self.exits is None else min(self.exits, most)
        exits = sorted({max(round((i + 1) * most / count), 1) for i in range(count)})
        return ExitDrafters(request, exits, self.draft, True, self.decay, self.confidence)
