"""Constrained generation with particles: every continuation is tried several times, and the promising ones go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, log
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.logits_process import LogitsProcessorList

from ..core.errors import ThriftError
from .constraints import State
from .engine import DecodeStats
from .rejection import Choice
from .verify import Stopper

Choose = Callable[[np.ndarray, Callable[[int], bool]], Choice]
"""From log probabilities ``(vocabulary,)`` and a question to a token."""


@dataclass
class Population:
    """The particles of one prompt.

    Attributes:
        states: of the constraint.
        log_weights: ``(particles,)`` float64; -inf for those that found no token.
        tokens: generated so far, the end-of-sequence token included.
        done: which will not grow any more.
        complete: which ended where the constraint lets a text end.
    """

    states: list[State]
    log_weights: np.ndarray
    tokens: list[list[int]]
    done: list[bool]
    complete: list[bool]

    @classmethod
    def at(cls, state: State, particles: int) -> Population:
        n = particles
        return cls([state] * n, np.zeros(n), [[] for _ in range(n)], [False] * n, [False] * n)

    @property
    def log_evidence(self) -> float:
        """Log of the mean weight: an unbiased estimate of how probable texts are that the constraint accepts."""
        return log_sum(self.log_weights) - log(len(self.states))

    @property
    def shares(self) -> np.ndarray:
        """The normalised weights."""
        return np.exp(self.log_weights - log_sum(self.log_weights))

    @property
    def effective(self) -> float:
        """The effective number of particles."""
        return float(1 / (self.shares**2).sum())

    def grow(self, j: int, logp: np.ndarray, choose: Choose, ends: set[int]) -> tuple[int | None, int]:
        """Choose the next token of a particle; returns it, None if it has none, and the number of questions."""
        state = self.states[j]
        choice = choose(logp, state.accepts)
        if choice.log_weight == -inf:
            self.done[j] = True
            self.complete[j] = not ends and state.complete  # with no token to end with, this is the end
            if not self.complete[j]:
                self.log_weights[j] = -inf
            return None, choice.checks
        self.log_weights[j] += choice.log_weight
        self.tokens[j].append(choice.token)
        if choice.token in ends:
            self.complete[j] = True
        else:
            self.states[j] = state.then(choice.token)
        return choice.token, choice.checks

    def resample(self, rng: np.random.Generator) -> list[int]:
        """Draw as many particles by weight, systematically, and give all the mean weight; returns which were drawn."""
        n = len(self.states)
        at = (rng.random() + np.arange(n)) / n
        drawn: list[int] = np.minimum(np.searchsorted(self.shares.cumsum(), at), n - 1).tolist()
        self.log_weights = np.full(n, self.log_evidence)
        self.states = [self.states[j] for j in drawn]
        self.tokens = [list(self.tokens[j]) for j in drawn]
        self.done = [self.done[j] for j in drawn]
        self.complete = [self.complete[j] for j in drawn]
        return drawn


@dataclass
class Outcome:
    """What :func:`generate` found: a population a prompt, and the counts of the call."""

    populations: list[Population]
    stats: DecodeStats = field(default_factory=DecodeStats)


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    stopper: Stopper,
    config: Any,
    streamer: Any,
    *,
    starts: list[State],
    particles: int,
    threshold: float,
    choose: Choose,
    rng: np.random.Generator,
    **kwargs: Any,
) -> Outcome:
    """Grow ``particles`` continuations of every prompt until all are done.

    Args:
        starts: of each prompt the state of its constraint.
        threshold: a population is resampled when fewer than this share of its particles are effective.

    Raises:
        ThriftError: a prompt of which no particle has a continuation that its constraint accepts.
    """
    populations = [Population.at(state, particles) for state in starts]
    out = Outcome(populations)
    began = perf_counter()
    outputs = model._prefill(input_ids, config, kwargs, is_first_iteration=True)
    kwargs = model._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=False)
    cache, logits = kwargs["past_key_values"], outputs.logits[:, -1]
    if particles > 1:
        if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
            raise ThriftError("particles share a plain key-value cache: set particles=1, or leave the cache stage out")
        cache.batch_repeat_interleave(particles)
        logits = logits.repeat_interleave(particles, dim=0)
        input_ids, kwargs = model._expand_inputs_for_generation(
            expand_size=particles, is_encoder_decoder=False, input_ids=input_ids, **kwargs
        )
    out.stats.prefill_seconds = perf_counter() - began
    checks, step, filler = 0, 0, getattr(config, "_pad_token_tensor", None)
    pad = 0 if filler is None else int(filler)
    while True:
        began = perf_counter()
        scores = processors(input_ids, logits.to(torch.float32, copy=True))  # type: ignore[arg-type]
        laws = scores.log_softmax(-1).double().cpu().numpy()
        fed, index = [], []
        for row, population in enumerate(populations):
            for j in range(particles):
                token = None
                if not population.done[j]:
                    token, asked = population.grow(j, laws[row * particles + j], choose, stopper.ends)
                    checks += asked
                fed.append(pad if token is None else token)
            if not (population.log_weights > -inf).any():
                raise ThriftError(
                    f"after {step} tokens the constraint accepts no token that the model can give: loosen it, or what "
                    "cuts the model's law (top_k, top_p), or try more particles"
                )
        input_ids = torch.cat([input_ids, input_ids.new_tensor(fed)[:, None]], dim=1)
        if streamer is not None:
            streamer.put(input_ids[:, -1].cpu())
        step += 1
        over = stopper(fed, input_ids, input_ids.shape[1], None)
        for row, population in enumerate(populations):
            mine = slice(row * particles, (row + 1) * particles)
            population.done = [a or b for a, b in zip(population.done, over[mine], strict=True)]
            low = population.effective < threshold * particles and not all(population.done)
            drawn = population.resample(rng) if low else range(particles)
            index += [row * particles + j for j in drawn]
        if index != list(range(len(index))):
            order = torch.tensor(index, device=input_ids.device)
            input_ids = input_ids[order]
            cache.reorder_cache(order)
        out.stats.draft_seconds += perf_counter() - began
        if all(all(population.done) for population in populations):
            break
        began = perf_counter()
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **kwargs)
        outputs = model(**inputs, return_dict=True)
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=False)
        logits = outputs.logits[:, -1]
        out.stats.verify_seconds += perf_counter() - began
    if streamer is not None:
        streamer.end()
    out.stats.committed = out.stats.forwards = step
    out.stats.extra = {
        "checks": checks,
        "log_evidence": sum(population.log_evidence for population in populations),
        "complete": sum(sum(population.complete) for population in populations),
    }
    return out


def log_sum(logs: np.ndarray) -> float:
    """Log of the sum of exponentials."""
    top = float(logs.max())
    return top if top == -inf else top + log(float(np.exp(logs - top).sum()))
