"""Truncation: keep the start, the end, or both. The baseline that every prompt compressor has to beat."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from ..core.budget import Budget
from ..core.errors import ThriftError, did_you_mean
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.tokens import Span, token_spans
from .protect import OF_A_SENTENCE, missing
from .selection import best_within
from .spans import merged, spans_to_map, words


@method("truncate", stage="text", paper="baseline: plain truncation", needs=("text", "tokenizer"))
class Truncate:
    """Keeps the first tokens of a text, the last, or both ends.

    The cut lies at a token boundary of the user's tokenizer and never inside a word, so up to a word less than the
    budget is kept. Only where not even one word fits (a line of base64, say) is that word cut, between two tokens.
    Protected spans are kept wherever they are, and count.

    Attributes:
        rate: share of the tokens to keep, in (0, 1]; an int is a number of tokens.
        where: what is KEPT. ``head`` keeps the start and drops the end; ``tail`` keeps the end and drops the start;
            ``middle`` truncates in the middle: it keeps half the budget at the start and half at the end, as LongBench
            (arXiv 2308.14508) does with prompts that are too long.
    """

    rate: float = 0.5
    where: str = "head"

    def __post_init__(self) -> None:
        Budget.of(self.rate)
        if self.where not in (known := ("head", "tail", "middle")):
            raise ThriftError(f"truncate has no where='{self.where}': {did_you_mean(str(self.where), known)}")

    def reduce(self, view: View) -> TokenMap:
        text = view.text
        if "protected_spans" in view and view.protected_spans:
            return spans_to_map(self._around(view, text), len(text))
        tokens = token_spans(view.tokenizer, text)
        target = Budget.of(self.rate).tokens(len(tokens))
        if target == len(tokens):
            return spans_to_map([(0, len(text))], len(text))

        at_end = {"head": 0, "tail": target, "middle": target // 2}[self.where]
        at_start = target - at_end
        first_dropped, last_dropped = tokens[at_start][0], tokens[len(tokens) - at_end - 1][1]

        edges = [0, *(end for _, end in words(text))]  # of words
        head = edges[bisect_right(edges, first_dropped) - 1]
        tail = edges[bisect_left(edges, last_dropped)]
        if head == 0 and tail == len(text):
            head, tail = first_dropped, last_dropped
        return spans_to_map([(0, head), (tail, len(text))], len(text))

    def _around(self, view: View, text: str) -> list[Span]:
        """The same where spans are protected: they stay, and the words at the ends fill what is left of the budget."""
        units = words(text)
        n = len(units)
        near = {"head": range(n, 0, -1), "tail": range(n), "middle": [abs(2 * i - n + 1) for i in range(n)]}[self.where]
        stays = [p for p in view.protected_spans if p.kind not in OF_A_SENTENCE]
        for _ in range(3):  # what the cut tears out of its sentence stays, which moves the cut
            spans = [(start, end) for start, end, _ in stays]
            kept = best_within(text, units, near, self.rate, view.tokenizer, protect=spans, fill=False)
            if not (lost := missing(text, view.protected_spans, merged(kept))):
                break
            stays = sorted([*stays, *lost])
        return kept
