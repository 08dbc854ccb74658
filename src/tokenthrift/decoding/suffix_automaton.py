"""Suffix automaton: draft what followed the longest suffix of the text that occurred before."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.draft import NOTHING, Draft
from ..core.method import method
from .chances import Trust, whole
from .protocols import Request

_LONGEST = 16  # matches from here on are trusted alike


@method(
    "suffix_automaton",
    stage="decode",
    paper="SAM Decoding: Speculative Decoding via Suffix Automaton",
    arxiv="2411.10666",
)
class SuffixAutomatonDrafts:
    """Draft by copying what followed the longest suffix of the text, however long, that occurred before.

    A suffix automaton of the text grows with it and follows the longest match: constant work a token on average. The
    copy starts after the first occurrence of the match.

    Args:
        draft: longest draft, in tokens; the authors' ``n_predicts`` is one more, it counts the last committed token.
        shortest: shortest match to copy from. The authors ask for 5, and draft with Token Recycling or EAGLE below.
        overlap: when the copy reaches the end of the text, go on with the draft itself, as LZ77 does. False takes a
            shorter match that has ``draft`` tokens after it, as the authors do, and stops at the end if there is none.
        adaptive: give every guess its chance, so that only what pays on this machine is verified. For each length of
            match, the share of right next-token guesses is tracked. False always drafts in full.

    This is the paper's dynamic automaton; the static one, over a collection of texts, is not here. A text of n tokens
    takes about 0.4 kB of automaton a token.

    Raises:
        ThriftError: a parameter outside its range.
    """

    draft: int = 40
    shortest: int = 1
    overlap: bool = True
    adaptive: bool = True

    def __post_init__(self) -> None:
        whole("suffix_automaton", draft=self.draft, shortest=self.shortest)

    def start(self, tokens: Sequence[int], request: Request | None = None) -> SuffixDrafter:
        """The drafter of a sequence that begins with the prompt ``tokens``."""
        return SuffixDrafter(self, tokens)


class SuffixAutomaton:
    """All substrings of a text, those that end at the same places in one state; state 0 is the empty one.

    Attributes:
        next: of each state, the state after each token.
        link: the state of the longest suffix that ends at more places; -1 for state 0.
        length: of the longest string of the state.
        first: where the first occurrence ends, counted in tokens.
    """

    def __init__(self) -> None:
        self.next: list[dict[int, int]] = [{}]
        self.link, self.length, self.first = [-1], [0], [0]
        self._last = 0

    def append(self, token: int) -> None:
        """The text grows by a token."""
        end = self.length[self._last] + 1
        new = self._state({}, end, end)
        at, self._last = self._last, new
        while at >= 0 and token not in self.next[at]:
            self.next[at][token] = new
            at = self.link[at]
        if at < 0:
            self.link[new] = 0
            return
        to = self.next[at][token]
        if self.length[to] == self.length[at] + 1:
            self.link[new] = to
            return
        # Of the strings in this state, the shorter ones now end here too: they get a state of their own.
        short = self._state(self.next[to].copy(), self.length[at] + 1, self.first[to])
        self.link[short] = self.link[to]
        self.link[to] = self.link[new] = short
        while at >= 0 and self.next[at].get(token) == to:
            self.next[at][token] = short
            at = self.link[at]

    def follow(self, state: int, length: int, token: int) -> tuple[int, int]:
        """From the longest match, its state and length, to that after a further token."""
        while state and token not in self.next[state]:
            state = self.link[state]
            length = self.length[state]
        to = self.next[state].get(token)
        return (0, 0) if to is None else (to, length + 1)

    def _state(self, following: dict[int, int], length: int, first: int) -> int:
        self.next.append(following)
        self.link.append(0)
        self.length.append(length)
        self.first.append(first)
        return len(self.next) - 1


class SuffixDrafter:
    """One sequence (a :class:`tokenthrift.decoding.protocols.Drafter`).

    The automaton has all tokens but the last, so that the text's own end is not the match.
    """

    def __init__(self, method: SuffixAutomatonDrafts, prompt: Sequence[int]) -> None:
        self.method = method
        self.tokens: list[int] = []
        self.automaton = SuffixAutomaton()
        self.match = (0, 0)
        self._trust = Trust(_LONGEST)
        for token in prompt:
            self._append(token)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add committed tokens; each shows whether it would have been copied."""
        for token in tokens:
            if self.method.adaptive and (source := self._source()):
                n, at = source
                self._trust.note(n, self.tokens[at] == token)
            self._append(token)

    def propose(self, limit: int) -> Draft:
        """At most ``min(limit, draft)`` tokens, copied from after the longest match."""
        source = self._source()
        if source is None:
            return NOTHING
        n, at = source
        chances = self._trust.chances(n, self.method.draft) if self.method.adaptive else None
        length = max(min(limit, self.method.draft if chances is None else len(chances)), 0)
        draft = self.tokens[at : at + length]
        while self.method.overlap and len(draft) < length:
            draft.append(draft[at - len(self.tokens)])
        return Draft.chain(draft, None if chances is None else chances[: len(draft)], "suffix")

    def _source(self) -> tuple[int, int] | None:
        """The length of the match to copy from, and the position after it."""
        state, n = self.match
        sam = self.automaton
        if not self.method.overlap:
            known = len(self.tokens) - 1
            while sam.link[state] > 0 and known - sam.first[state] <= self.method.draft:
                state = sam.link[state]
        n = min(n, sam.length[state])
        return (n, sam.first[state]) if n >= self.method.shortest else None

    def _append(self, token: int) -> None:
        if self.tokens:
            self.automaton.append(self.tokens[-1])
        self.match = self.automaton.follow(*self.match, token)
        self.tokens.append(token)
