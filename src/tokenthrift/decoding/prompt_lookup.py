"""Prompt lookup: draft what followed the last tokens where they occurred before."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.draft import NOTHING, Draft
from ..core.errors import ThriftError
from ..core.method import method
from .chances import Trust, whole
from .protocols import Request

_MULTIPLIER, _MASK = 0x1F3A_8B2D_6E49_C75B, (1 << 61) - 1  # of the rolling hash; any large odd number will do


@method(
    "prompt_lookup",
    stage="decode",
    paper="Prompt Lookup Decoding (Saxena, 2023); Inference with Reference: Lossless Acceleration of LLMs (LLMA)",
    arxiv="2304.04487",
)
class PromptLookup:
    """Draft by copying what followed the last tokens where they occurred before, in the prompt or the output.

    The longest of the last ``ngram``, ..., 2, 1 tokens that occurred before decides. Lookups cost O(ngram) a token
    however long the text is: an index from n-grams to positions grows with it.

    Args:
        ngram: longest n-gram to match, in tokens.
        draft: longest draft, in tokens.
        match: ``"latest"`` copies from the most recent occurrence; ``"earliest"`` from the first, as transformers does.
        overlap: when the copy reaches the end of the text, go on with the draft itself, as LZ77 does, so that a loop of
            any period is drafted in full; False stops there, as transformers does.
        adaptive: give every guess its chance, so that only what pays on this machine is verified. For each n-gram
            length, the share of right next-token guesses is tracked, also while nothing is drafted (which costs no
            forward). False always drafts in full.

    With default parameters a text of n tokens takes about 0.7 kB of index a token.

    ``PromptLookup(ngram=2, match="earliest", overlap=False, adaptive=False)`` proposes what transformers'
    ``prompt_lookup_num_tokens=10`` proposes, except that transformers cuts a draft before an end-of-sequence token and
    before a token that a logits processor forbids: the engine here cuts after the former and lets verification reject
    the latter.

    Raises:
        ThriftError: a parameter outside its range.
    """

    ngram: int = 10
    draft: int = 24
    match: str = "latest"
    overlap: bool = True
    adaptive: bool = True

    def __post_init__(self) -> None:
        whole("prompt_lookup", ngram=self.ngram, draft=self.draft)
        if self.match not in ("latest", "earliest"):
            raise ThriftError(f"prompt_lookup matches the 'latest' or the 'earliest' occurrence, not {self.match!r}")

    def start(self, tokens: Sequence[int], request: Request | None = None) -> PromptLookupDrafter:
        """The drafter of a sequence that begins with the prompt ``tokens``."""
        return PromptLookupDrafter(self, tokens)

    def propose(self, tokens: Sequence[int], limit: int) -> list[int]:
        """At most ``limit`` guesses at what follows ``tokens``, without state: for a single look."""
        return list(self.start(tokens).propose(limit).tokens)


class PromptLookupDrafter:
    """The text of one sequence and its n-gram index (a :class:`tokenthrift.decoding.protocols.Drafter`).

    The index maps a 61-bit hash of an n-gram to the position after its remembered occurrence. Two n-grams with one
    hash, one pair in 10^18, would cost a bad guess and nothing else.
    """

    def __init__(self, method: PromptLookup, prompt: Sequence[int]) -> None:
        self.method = method
        self.tokens: list[int] = []
        self._after: dict[int, int] = {}
        self._grams: list[int] = []  # hashes of the last 1, 2, ... ngram tokens
        self._trust = Trust(method.ngram)
        self._append(prompt)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add committed tokens; each shows whether the lookup would have guessed it."""
        for token in tokens:
            if self.method.adaptive and (found := self._find()):
                n, at = found
                self._trust.note(n, self.tokens[at] == token)
            self._append((token,))

    def propose(self, limit: int) -> Draft:
        """At most ``min(limit, draft)`` tokens, copied from after the longest n-gram that occurred before."""
        found = self._find()
        if not found:
            return NOTHING
        n, at = found
        chances = self._trust.chances(n, self.method.draft) if self.method.adaptive else None
        length = max(min(limit, self.method.draft if chances is None else len(chances)), 0)
        draft = self.tokens[at : at + length]
        if self.method.overlap:
            period = len(self.tokens) - at
            while len(draft) < length:
                draft.append(draft[-period])
        return Draft.chain(draft, None if chances is None else chances[: len(draft)], "lookup")

    def _find(self) -> tuple[int, int] | None:
        """The longest matching n and the position to copy from."""
        for n in range(len(self._grams), 0, -1):
            at = self._after.get(self._grams[n - 1])
            if at is not None:
                return n, at
        return None

    def _append(self, tokens: Sequence[int]) -> None:
        # An n-gram enters the index when the token after it is known, so the text's own end never matches itself.
        after, text, ngram = self._after, self.tokens, self.method.ngram
        latest = self.method.match == "latest"
        for token in tokens:
            end = len(text)
            for gram in self._grams:
                if latest or gram not in after:
                    after[gram] = end
            text.append(token)
            hashed, self._grams = 0, []
            for t in reversed(text[-ngram:]):
                hashed = (hashed * _MULTIPLIER + t + 1) & _MASK
                self._grams.append(hashed)
