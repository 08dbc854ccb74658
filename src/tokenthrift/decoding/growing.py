"""Trees that grow: a draft model is asked what may follow some nodes, and a method decides what to add and ask next."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..core.draft import ROOT, Draft, Drawn
from .chances import SURE

Growth: TypeAlias = Generator[list[int], Tensor, None]
"""Yields nodes, parents first and each once, and is sent the laws ``(nodes, vocabulary)`` of what follows them."""
_EDGES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
_DECAY, _PRIOR = 0.99, 1.0


class Trust:
    """How often guesses stood, by the probability that the draft model gave them: calibrated while it drafts.

    Within a band of probabilities the chance of a guess is proportional to its probability; at first equal to it.
    """

    def __init__(self) -> None:
        self._stood = [_PRIOR] * (len(_EDGES) + 1)
        self._said = [_PRIOR] * (len(_EDGES) + 1)

    def __call__(self, q: float) -> float:
        """The chance that a guess of probability ``q`` stands, once all above it do."""
        band = bisect_left(_EDGES, q)
        return min(q * self._stood[band] / self._said[band], SURE)

    def note(self, q: float, stood: bool) -> None:
        """A guess of probability ``q`` was judged."""
        band = bisect_left(_EDGES, q)
        self._stood[band] = _DECAY * self._stood[band] + (1 - _DECAY) * _PRIOR + stood
        self._said[band] = _DECAY * self._said[band] + (1 - _DECAY) * _PRIOR + q


class Tree:
    """A draft that grows.

    Attributes:
        sample: whether guesses are drawn, so that a rule can undo what they were drawn from; else the likeliest are
            taken.
        worth: a node is worth asking the draft model about if its chance exceeds this.
        tokens, parents, chances, drawn: as in :class:`~tokenthrift.core.draft.Draft`.
        said: of every node, the draft model's probability.
    """

    def __init__(self, sample: bool, trust: Trust | None = None, worth: float = 0.0) -> None:
        self.sample, self.trust, self.worth = sample, trust or Trust(), worth
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.chances: list[float] = []
        self.said: list[float] = []
        self.drawn: dict[int, Drawn] = {}
        self._children: dict[int, dict[int, int]] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def chance(self, node: int) -> float:
        """That the node and all above it stand."""
        return 1.0 if node == ROOT else self.chances[node]

    def child(self, node: int, token: int) -> int | None:
        """The node that guesses ``token`` after ``node``."""
        return self._children.get(node, {}).get(token)

    def add(self, parent: int, tokens: Sequence[int], law: Tensor) -> list[int]:
        """Guess these tokens after ``parent``, after those that are there; ``law`` is all that may follow it.

        When sampling they are what was drawn from the law, in the order of drawing, repeats included. Returns the
        nodes, repeats included.
        """
        known = self._children.setdefault(parent, {})
        for token in tokens:
            if token not in known:
                known[token] = len(self.tokens)
                q = float(law[token])
                self.tokens.append(token)
                self.parents.append(parent)
                self.said.append(q)
                self.chances.append(self.chance(parent) * self.trust(q))
        if self.sample and len(tokens):
            before = self.drawn[parent].tokens if parent in self.drawn else ()
            self.drawn[parent] = Drawn([*before, *tokens], law)
        return [known[token] for token in tokens]

    def path(self, node: int) -> list[int]:
        """The tokens from the first guess to ``node``."""
        out: list[int] = []
        while node != ROOT:
            out.append(self.tokens[node])
            node = self.parents[node]
        return out[::-1]

    def judge(self, committed: Sequence[int]) -> None:
        """Tell the calibration which guesses stood: those that equal what was committed in their place."""
        node: int | None = ROOT
        for token in committed:
            if node is None:
                break
            for guess, child in self._children.get(node, {}).items():
                self.trust.note(self.said[child], guess == token)
            node = self.child(node, token)

    def draft(self, source: str, *, chances: bool) -> Draft:
        """What has grown; with chances if it may be cut, or drafting be paused, by them."""
        return Draft(self.tokens, self.parents, self.chances if chances else None, source, self.drawn)


def pick(law: Tensor, count: int, sample: bool) -> list[int]:
    """``count`` different tokens that may follow: the likeliest, or drawn without replacement; fewer if few may.

    The Gumbel-top-k trick: the largest of ``log law + Gumbel noise``, in order, are such a draw, in order.
    """
    scores = law.log()
    if sample:
        scores = scores - torch.empty_like(scores).exponential_().log()
    top = scores.topk(min(count, len(law)))
    return [token for token, score in zip(top.indices.tolist(), top.values.tolist(), strict=True) if score > -torch.inf]
