"""CopySpec: draft what followed the first occurrence of the last few tokens."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.draft import NOTHING, Draft
from ..core.method import method
from .chances import Trust, whole
from .protocols import Request

_PRIME, _BASE = (1 << 61) - 1, 0x0F5A_17C3_8E2B_94D1  # of the rolling hash
_LONGEST = 12  # copies that went on for longer are trusted alike


@method(
    "copyspec",
    stage="decode",
    paper="CopySpec: Accelerating LLMs with Speculative Copy-and-Paste Without Compromising Quality",
    arxiv="2502.08923",
)
class CopySpec:
    """Draft by copying what followed the last ``gamma`` tokens where they first occurred, in the prompt or the output.

    A rolling hash of the last ``gamma`` tokens is the key to the position after their first occurrence: constant work a
    token, whatever gamma is. Shorter matches are not tried. A copy ends where the text ends.

    Args:
        gamma: tokens that must match.
        copy: longest copy, in tokens.
        adaptive: give every guess its chance, so that only what pays on this machine is verified. Tracked is the share
            of right guesses by how many tokens the match has lasted. False always copies in full, as the authors do.

    The authors' code has three more ways: a draft model where nothing matches, no match in the last ``gamma - 1`` steps
    before the end, and when sampling an accepted guess only where the model's law leaves no other token. Here a step
    without a match is a plain one, and sampling accepts what the model draws.

    Raises:
        ThriftError: a parameter outside its range.
    """

    gamma: int = 3
    copy: int = 10
    adaptive: bool = True

    def __post_init__(self) -> None:
        whole("copyspec", gamma=self.gamma, copy=self.copy)

    def start(self, tokens: Sequence[int], request: Request | None = None) -> CopyDrafter:
        """The drafter of a sequence that begins with the prompt ``tokens``."""
        return CopyDrafter(self, tokens)


class CopyDrafter:
    """The text of one sequence and where its n-grams first ended (a :class:`tokenthrift.decoding.protocols.Drafter`).

    Two n-grams with one hash, one pair in 10^18, would cost a bad guess and nothing else.
    """

    def __init__(self, method: CopySpec, prompt: Sequence[int]) -> None:
        self.method = method
        self.tokens: list[int] = []
        self._after: dict[int, int] = {}  # hash of gamma tokens -> the position after them
        self._hash, self._leaving = 0, pow(_BASE, method.gamma, _PRIME)
        self._lasted = 0  # how long the match with one place of the text is
        self._at: int | None = None  # the position to copy from
        self._trust = Trust(max(_LONGEST, method.gamma))
        for token in prompt:
            self._append(token)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add committed tokens; each shows whether it would have been copied."""
        for token in tokens:
            if self._at is not None and self.method.adaptive:
                self._trust.note(self._lasted, self.tokens[self._at] == token)
            self._append(token)

    def propose(self, limit: int) -> Draft:
        """At most ``min(limit, copy)`` tokens from after the first occurrence."""
        if self._at is None:
            return NOTHING
        draft = self.tokens[self._at : self._at + max(min(limit, self.method.copy), 0)]
        chances = self._trust.chances(self._lasted, len(draft)) if self.method.adaptive else None
        return Draft.chain(draft if chances is None else draft[: len(chances)], chances, "copy")

    def _append(self, token: int) -> None:
        # An n-gram enters the index when the token after it is known, so the text's own end never matches itself.
        text, gamma = self.tokens, self.method.gamma
        if len(text) >= gamma:
            self._after.setdefault(self._hash, len(text))
        text.append(token)
        left = text[-gamma - 1] + 1 if len(text) > gamma else 0
        self._hash = (self._hash * _BASE + token + 1 - left * self._leaving) % _PRIME
        before = self._at
        self._at = self._after.get(self._hash)
        going_on = self._at is not None and before is not None and self._at == before + 1
        self._lasted = self._lasted + 1 if going_on else gamma
