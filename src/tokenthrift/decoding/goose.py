"""GOOSE: draft a deep spine copied from the text, with branches of the model's own likely tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import ceil
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from ..core.method import method
from .chances import Trust, whole
from .draft import NOTHING, ROOT, Draft
from .protocols import Request
from .spine import Copies, Successors

_FAR = 100  # nodes at most where the spine is sure
_UNLIKELY = 0.01  # score below which no branch is made
_ALONG = 0.5  # share of the branches that hang on the spine, not on the root


@method(
    "goose",
    stage="decode",
    paper="Goose: Anisotropic Speculation Trees for Training-Free Speculative Decoding",
    arxiv="2604.02047",
)
class Goose:
    """Draft a tree from two sources: a deep spine copied from the text, and wide branches of likely successors.

    The spine is what followed the last 5, 4 or 3 tokens where they first occurred. The surer it is (all occurrences
    agree, or the copy is long; copies were accepted of late), the more of the nodes it gets. The rest are branches at
    the root and along the spine, fewer further down: the successors of a pair of tokens, else of a token, that the
    model last thought likely (Token Recycling with pairs). Branches go on breadth-first.

    Args:
        nodes: nodes of the tree, the last committed token included; up to 100 where the spine is sure.
        depth: branches do not grow below it; those at a deep node of the spine have one level.
        k: successors kept.
        adaptive: give every guess its chance, so that only what pays on this machine is verified: of the spine, the
            share of right copies by length of match and agreement; of branches, that of right successors by score.
            False always verifies the whole tree, as the authors do.
        share: keep the successors of a model from request to request: drafts get better, and hold tokens that other
            requests wrote. False begins every request with none, as the authors do.

    Different from the authors' code: the table does not learn from the prompt's logits, of which ``generate`` computes
    only the last (their ``use_prefill_harvest=False``); the pair before the last committed token is learned in every
    step, theirs leaves it out where a tree was verified; a spine that had no branches counts as well for how well
    copies do; the 50,000 latest pairs are kept, theirs all.

    Raises:
        ThriftError: a parameter outside its range.
    """

    nodes: int = 60
    depth: int = 6
    k: int = 10
    adaptive: bool = True
    share: bool = True

    def __post_init__(self) -> None:
        whole("goose", least=2, nodes=self.nodes)
        whole("goose", depth=self.depth, k=self.k)

    def start(self, tokens: Sequence[int], request: Request) -> GooseDrafter:
        """The drafter of a sequence that begins with the prompt ``tokens``."""
        if not self.share:
            return GooseDrafter(self, Successors(self.k), tokens)
        known = _successors.setdefault(request.model, {})
        return GooseDrafter(self, known.setdefault(self.k, Successors(self.k)), tokens)


def grow(
    method: Goose,
    successors: Successors,
    last: tuple[int | None, int],
    chain: Sequence[int],
    confidence: float,
    accepted: float,
) -> tuple[list[int], list[int], list[float], int]:
    """The tree: tokens, parents, scores of the branches, and the number of nodes that are spine, which come first.

    Args:
        last: the last two tokens.
        chain: the copy, which the spine is the beginning of.
        confidence: how sure the copy is.
        accepted: the share of spines that was accepted of late.
    """
    nodes = method.nodes + int(confidence * max(0, _FAR - method.nodes))
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
            if depths[-1] < method.depth:
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
        width = min(max(1, min(len(guesses), ceil(left * score))), max(1, method.k // depths[node]), left)
        left -= attach(node, guesses, width)
    return tokens, parents, scores, spine


def _harmonic(count: int, places: int) -> list[int]:
    """``count`` children over the places, in shares of 1, 1/2, 1/3, ..., at least one each as long as there are some."""
    total, shares, left = sum(1 / (i + 1) for i in range(places)), [], count
    for i in range(places):
        shares.append(min(max(1, int(count / (i + 1) / total)), left))
        left -= shares[-1]
    return shares


class GooseDrafter:
    """One sequence, and the successors that all share (a :class:`tokenthrift.decoding.protocols.Drafter`)."""

    def __init__(self, method: Goose, successors: Successors, prompt: Sequence[int]) -> None:
        self.method, self.successors = method, successors
        self.copies = Copies()
        self.accepted = 0.5  # share of the spine, of late
        self._trust = Trust(12), Trust(12)  # where occurrences differ, or there is one; where they agree
        self._draft = NOTHING
        for token in prompt:
            self.copies.append(token)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add committed tokens; each shows whether it would have been copied."""
        draft, node, right = self._draft, ROOT, 0
        for token in tokens:
            node = draft.child(node, token) if node is not None else None  # type: ignore[assignment]
            right += node is not None and draft.source(node) == "lookup"
            n, at, agreed = self.copies.find(self.copies.tokens[-5:])
            if n:
                self._trust[agreed].note(n, self.copies.tokens[at] == token)
            self.copies.append(token)
        spine = sum(draft.source(i) == "lookup" for i in range(len(draft)))
        if spine:
            self.accepted += 0.3 * (right / spine - self.accepted)

    def observe(self, draft: Draft, logits: Tensor) -> None:
        """Recycle: every token that was fed gets the likeliest successors that the model saw, accepted or not."""
        self._draft, text = draft, self.copies.tokens
        if not text:
            return
        fed = [text[-1], *draft.tokens]
        before: list[int | None] = [text[-2] if len(text) > 1 else None, *(fed[parent + 1] for parent in draft.parents)]
        likeliest, node = logits.argmax(-1).tolist(), ROOT
        while node is not None:  # along what the model itself says, before the table knows of it
            for token, score in self.successors(before[node + 1], fed[node + 1]):
                self.successors.calibration.note(score, token == likeliest[node + 1])
            node = draft.child(node, likeliest[node + 1])  # type: ignore[assignment]
        self.successors.update(before, fed, logits)

    def propose(self, limit: int) -> Draft:
        """The spine tree; a plain copy where no successors are known."""
        text = self.copies.tokens
        if not text:
            return NOTHING
        last = (text[-2] if len(text) > 1 else None, text[-1])
        chain, confidence = self.copies.chain(_FAR)
        if self.successors(*last):
            tokens, parents, scores, spine = grow(
                self.method, self.successors, last, chain, confidence, self.accepted
            )
        else:
            tokens = chain[: self.copies.longest]
            parents, scores, spine = list(range(ROOT, len(tokens) - 1)), [1.0] * len(tokens), len(tokens)
        sources = ["lookup"] * spine + ["recycling"] * (len(tokens) - spine)
        chances = self._chances(parents, scores, spine) if self.method.adaptive else None
        return Draft(tokens, parents, chances, sources).within(limit, set())

    def _chances(self, parents: Sequence[int], scores: Sequence[float], spine: int) -> list[float]:
        """Along the spine by trust; a branch beside the spine is for when the spine is wrong."""
        n, _, agreed = self.copies.find(self.copies.tokens[-5:])
        along = self._trust[agreed].chances(n, spine, least=0.0) if n else []
        chances = list(along)
        for node in range(spine, len(parents)):
            parent = parents[node]
            above = 1.0 if parent == ROOT else chances[parent]
            beside = along[parent + 1] if parent + 1 < len(along) and parent < spine else 0.0
            chances.append((above - beside) * self.successors.calibration(scores[node]))
        return chances


_successors: WeakKeyDictionary[Any, dict[int, Successors]] = WeakKeyDictionary()
"""Of each model, for as long as it lives: by k."""
