"""Drafting with the target's own first layers: which exit, how many tokens, and the forwards themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, repeat
from operator import mul
from typing import Any

import torch
from torch import Tensor

from ..core.draft import NOTHING, Draft
from ..core.errors import ThriftError
from ..models.depth import Depth
from ..models.packed import Step, packed_attention
from .chances import SURE
from .protocols import Request
from .runners import PackedRunner

_RARELY = 32  # steps between two looks at the exits while nothing is drafted, at most


def tokens_per_layer(accept: float, exit: int, draft: int, layers: int, head: float = 0.0) -> float:
    """Expected tokens of a round per layer loaded: ``draft`` forwards of ``exit`` layers, then one of all.

    Every guess is accepted with probability ``accept`` if those before it are. ``head`` is what reading off a token
    costs, in layers; 0 gives the paper's measure.
    """
    expected = draft + 1 if accept >= 1 else (1 - accept ** (draft + 1)) / (1 - accept)
    return expected / (draft * (exit + head) + layers + head)


def best_exit(rates: Mapping[int, float], most: int, layers: int, head: float = 0.0) -> tuple[int, int]:
    """The exit and the number of guesses, at most ``most``, with the most tokens per layer; (0, 0) is not to draft."""
    best, choice = tokens_per_layer(0, 0, 0, layers, head), (0, 0)
    for exit, rate in rates.items():
        for draft in range(1, most + 1):
            value = tokens_per_layer(rate, exit, draft, layers, head)
            if value > best:
                best, choice = value, (exit, draft)
    return choice


@dataclass
class Acceptance:
    """How often each exit would have guessed the target's token, recent tokens counting more.

    Attributes:
        decay: weight of a token against the one after it.
        hits, tries: decayed counts, by exit. One miss is assumed beforehand.
    """

    decay: float
    hits: dict[int, float] = field(default_factory=dict)
    tries: dict[int, float] = field(default_factory=dict)

    def note(self, exit: int, right: Sequence[bool]) -> None:
        """What an exit guessed for one token after the other."""
        for hit in right:
            self.hits[exit] = self.decay * self.hits.get(exit, 0.0) + hit
            self.tries[exit] = self.decay * self.tries.get(exit, 0.0) + 1

    def rate(self, exit: int) -> float:
        """The estimate."""
        return min(self.hits.get(exit, 0.0) / (self.tries.get(exit, 0.0) + 1), SURE)


@dataclass
class Confidence:
    """Where the confidence in guesses that stood parts from that in guesses that fell: half-way between the means."""

    decay: float
    means: dict[bool, float] = field(default_factory=dict)

    def note(self, sure: float, stood: bool) -> None:
        """A guess that was judged."""
        self.means[stood] = self.decay * self.means.get(stood, sure) + (1 - self.decay) * sure

    @property
    def threshold(self) -> float:
        """Guesses below are the last of their draft; 0 until both kinds were seen."""
        return sum(self.means.values()) / 2 if len(self.means) == 2 else 0.0


class ExitDrafters:
    """The drafters of a batch (:class:`tokenthrift.decoding.protocols.Drafters`): all rows leave at the same exit.

    The target's cache serves the drafts too: what they write behind the committed tokens is overwritten by the forward
    that verifies. While tokens are verified, the outputs of the exits' last layers are kept, and read off the shadow
    tokens that each exit would have guessed; nothing else tells how well an exit would do that is not in use.

    Args:
        exits: numbers of layers to choose from.
        most: guesses in a draft at most.
        adaptive: choose exit and length by tokens per layer; False takes the first exit and ``most`` guesses.
        decay: of the estimates.
        watch: end a draft at a guess of little confidence.
    """

    def __init__(
        self, request: Request, exits: Sequence[int], most: int, adaptive: bool, decay: float, watch: bool
    ) -> None:
        self.depth = depth_of(request.model)
        self.ends, self.exits, self.most, self.adaptive = request.ends, list(exits), most, adaptive
        self.acceptance = Acceptance(decay)
        self.confidence = Confidence(decay) if watch else None
        self.runner: PackedRunner | None = None
        self._last: list[int | None] = []
        self._verified: list[Draft | None] = []
        self._sure: list[list[float]] = []  # of the guesses of each row's last draft
        self._wait, self._period = 0, 1

    def attach(self, runner: Any) -> None:
        """The batch's runner, once its cache is filled."""
        if not isinstance(runner, PackedRunner):
            raise ThriftError(
                "drafts by early exit need the model's plain key-value cache: leave out what replaces the attention or "
                "the cache, or use another decode method"
            )
        self.runner = runner
        if self.adaptive:
            runner.watched = [self.depth.layers[exit - 1] for exit in self.exits]

    def observe(self, drafts: Sequence[Draft | None], logits: Sequence[Tensor]) -> None:
        self._verified = list(drafts)

    def extend(self, tokens: Sequence[Sequence[int]]) -> None:
        """Judge the exits by the tokens committed."""
        self._last = [int(new[-1]) if new else None for new in tokens]
        drafted = any(draft is not None and len(draft) for draft in self._verified)
        if drafted and self.confidence is not None:
            for draft, new, sure in zip(self._verified, tokens, self._sure, strict=True):
                for guess, token, s in zip(draft.tokens if draft is not None else (), new, sure, strict=False):
                    self.confidence.note(s, guess == token)
        if drafted:
            self._wait, self._period = 0, 1
        if self.runner is None or not self.runner.seen:
            return
        if self._wait:
            self._wait -= 1
            return
        if not drafted:
            self._wait, self._period = self._period, min(2 * self._period, _RARELY)
        self._look(tokens)

    def propose(self, limits: Sequence[int | None]) -> list[Draft]:
        """A chain for every row, drafted token by token in forwards that all rows share."""
        exit, length = self.exits[0], self.most
        if self.adaptive:
            rates = {e: self.acceptance.rate(e) for e in self.exits}
            exit, length = best_exit(rates, self.most, len(self.depth.layers), self.depth.head_layers)
        rooms = [0 if limit is None else min(limit, length) for limit in limits]
        guesses, self._sure = self._draft(exit, rooms)
        rate = self.acceptance.rate(exit)
        chances = [list(accumulate(repeat(rate, len(row)), mul)) if self.adaptive else None for row in guesses]
        return [
            Draft.chain(row, chance, f"exit {exit}") if row else NOTHING
            for row, chance in zip(guesses, chances, strict=True)
        ]

    def _draft(self, exit: int, rooms: Sequence[int]) -> tuple[list[list[int]], list[list[float]]]:
        """Greedy guesses of the first ``exit`` layers, at most so many a row, and the probability of each."""
        guesses: list[list[int]] = [[] for _ in rooms]
        sure: list[list[float]] = [[] for _ in rooms]
        runner = self.runner
        if runner is None or not any(rooms):
            return guesses, sure
        packing = runner.cache.packing
        committed, fed = list(packing.grown), list(self._last)
        floor = 0.0 if self.confidence is None else self.confidence.threshold
        try:
            for k in range(max(rooms)):
                live = [row for row, room in enumerate(rooms) if k < room and fed[row] is not None]
                if not live:
                    break
                logits = self._forward(exit, fed, live)
                tops = logits.argmax(-1).tolist()
                if self.confidence is not None:
                    probable = logits.float().softmax(-1).amax(-1).tolist()
                for i, row in enumerate(live):
                    packing.grown[row] += 1
                    guesses[row].append(tops[i])
                    fed[row] = tops[i]
                    if self.confidence is not None:
                        sure[row].append(probable[i])
                    if tops[i] in self.ends or (self.confidence is not None and probable[i] < floor):
                        fed[row] = None
        finally:
            packing.grown[:] = committed
        return guesses, sure

    def _forward(self, exit: int, fed: Sequence[int | None], live: Sequence[int]) -> Tensor:
        """The logits ``(live rows, vocabulary)`` after one more token each."""
        assert self.runner is not None
        cache, device = self.runner.cache, self.runner.model.device
        cache.packing.step = Step([NOTHING if row in live else None for row in range(len(fed))], device)
        with self.depth.running(range(exit)), packed_attention(self.runner.modules, cache):
            hidden = self.depth.backbone(
                input_ids=torch.tensor([[fed[row] for row in live]], device=device),
                position_ids=torch.tensor([cache.packing.positions()], device=device),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        logits: Tensor = self.depth.head(hidden[0])
        return logits

    def _look(self, tokens: Sequence[Sequence[int]]) -> None:
        """Shadow tokens: what every exit would have guessed where the committed tokens stand."""
        assert self.runner is not None
        at: list[int] = []
        start = 0
        for draft, new in zip(self._verified, tokens, strict=True):
            if draft is not None:
                at += range(start, start + len(new))
                start += len(draft) + 1
        hidden = torch.stack([layer[0, at] for layer in self.runner.seen])
        shadows = self.depth.read(hidden).argmax(-1).tolist()
        truth = [token for draft, new in zip(self._verified, tokens, strict=True) if draft is not None for token in new]
        for exit, row in zip(self.exits, shadows, strict=True):
            self.acceptance.note(exit, [a == b for a, b in zip(row, truth, strict=True)])


def depth_of(model: Any) -> Depth:
    """The model's layers; they must be at least two, for there to be an exit before the last."""
    depth = Depth(model)
    if len(depth.layers) < 2:
        raise ThriftError(f"{type(model).__name__} has a single layer: there is no earlier exit")
    return depth
