"""Level-switch search: spread a fixed budget over the layers by evolution, without gradients (EvoPress).

EvoPress: Towards Accurate Dynamic Model Compression via Evolutionary Search, arXiv 2410.14649. Nothing here knows of
models: an individual is a vector of integers, one a layer, and what it is worth comes from a function.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..core.errors import ThriftError

Levels = tuple[int, ...]
"""An individual: the integer level of every layer."""
Cost = Callable[[Levels], float]
Fitness = Callable[[Levels, tuple[int, ...]], float]
"""Of an individual on the inputs with these indices; lower is better."""


class Stage(NamedTuple):
    """One round of selection: all candidates are compared on ``inputs`` random inputs, ``survivors`` go on."""

    survivors: int
    inputs: int


@dataclass(frozen=True)
class Space:
    """The individuals there are: which mutations make, and which are left alone.

    Attributes:
        low, high: bounds of every level.
        step: by how much one switch changes a level.
        cost: what an individual costs; None when the sum of the levels is the cost, which switches conserve.
        band: the costs allowed, both ends included.
    """

    low: int = 0
    high: int = 2**31
    step: int = 1
    cost: Cost | None = None
    band: tuple[float, float] = (-math.inf, math.inf)

    def __post_init__(self) -> None:
        if self.step < 1 or self.low > self.high or self.band[0] > self.band[1]:
            raise ThriftError("a search needs step >= 1, low <= high and a band from its lower to its upper end")

    def __contains__(self, levels: Levels) -> bool:
        in_band = self.cost is None or self.band[0] <= self.cost(levels) <= self.band[1]
        return all(self.low <= level <= self.high for level in levels) and in_band

    def moves(self, levels: Sequence[int], by: int) -> list[int]:
        """The layers whose level may change by ``by``."""
        return [i for i, level in enumerate(levels) if self.low <= level + by <= self.high]


@dataclass(frozen=True)
class Generation:
    """What one generation came to.

    ``fitness`` is that of ``levels``, the parent of the next generation, and ``parent_fitness`` that of the parent of
    this one, both on the inputs of the last stage: the first is never the larger. ``offspring`` is how many there were.
    """

    number: int
    levels: Levels
    fitness: float
    parent_fitness: float
    offspring: int


def level_switch_search(
    start: Sequence[int],
    fitness: Fitness,
    inputs: int,
    space: Space,
    *,
    generations: int,
    offspring: int = 16,
    stages: Sequence[Stage] = (Stage(4, 2), Stage(1, 8)),
    seed: int = 0,
    done: int = 0,
) -> Iterator[Generation]:
    """Improve ``start`` generation by generation, each offspring of the one parent that the last one left.

    A generation mutates the parent into ``offspring`` different individuals (:func:`mutate`; fewer if there are no
    more), thins them out stage by stage on growing random batches of inputs, and lets the parent join the last stage,
    so that it is only replaced by what is better on the same inputs.

    Every generation draws from a source of chance of its own, made of ``seed`` and its number. So the same search can
    be taken up again: ``done`` generations were done, and ``start`` is what the last of them left.

    Args:
        fitness: of an individual on some of the ``inputs`` inputs, given by their indices; not-a-number is worst.
        stages: from many survivors on few inputs to one survivor on many.

    Raises:
        ThriftError: settings that make no search, or a ``start`` outside ``space``.
    """
    if not stages or stages[-1].survivors != 1 or min(min(stage) for stage in stages) < 1:
        raise ThriftError("the stages of a search need at least one survivor and input each, the last one survivor")
    if inputs < 1 or offspring < 1 or generations < 0:
        raise ThriftError("a search needs at least one input and one offspring a generation")
    parent = tuple(start)
    if parent not in space:
        raise ThriftError(f"the search cannot start at {list(parent)}: it is outside the bounds or the allowed cost")
    rises = cost_rises(parent, space)
    for number in range(done + 1, generations + 1):
        chance = random.Random(f"{seed}/{number}")
        pool = brood(parent, space, offspring, chance, rises)
        born, scores = len(pool), {}
        for k, (survivors, size) in enumerate(stages, start=1):
            if k == len(stages):
                pool = [parent, *pool]  # in front: of equals the parent stays
            batch = tuple(sorted(chance.sample(range(inputs), min(size, inputs))))
            scores = {levels: _or_inf(fitness(levels, batch)) for levels in pool}
            pool = sorted(pool, key=scores.__getitem__)[:survivors]  # stable
        [best] = pool
        yield Generation(number, best, scores[best], scores[parent], born)
        parent = best


def brood(parent: Levels, space: Space, count: int, chance: random.Random, rises: bool = True) -> list[Levels]:
    """Up to ``count`` mutations of a parent, all different, and different from it."""
    found = {parent: None}
    for _ in range(8 * count):
        child = mutate(parent, space, chance, rises)
        if child is not None:
            found.setdefault(child)
        if len(found) > count:
            break
    return list(found)[1:]


def mutate(parent: Levels, space: Space, chance: random.Random, rises: bool = True) -> Levels | None:
    """Some level switches: min(U{1..3}, U{1..3}) times one layer goes a step down and another a step up.

    Switches keep the sum of the levels, not always the cost: a token removed in an early layer saves more than one
    removed in a late one. What falls out of the band of costs takes single steps, in random layers, until it is back.
    Returns None when it does not get there, or when no layer can move.

    Args:
        rises: whether the cost rises with the levels; see :func:`cost_rises`.
    """
    levels = list(parent)
    for _ in range(min(chance.randint(1, 3), chance.randint(1, 3))):
        down = space.moves(levels, -space.step)
        if not down:
            return None
        i = chance.choice(down)
        up = [j for j in space.moves(levels, space.step) if j != i]
        if not up:
            return None
        levels[i] -= space.step
        levels[chance.choice(up)] += space.step
    if space.cost is None:
        return tuple(levels)
    for _ in range(len(levels) + 1):
        cost, (low, high) = space.cost(tuple(levels)), space.band
        if low <= cost <= high:
            return tuple(levels)
        if not math.isfinite(cost):  # not a possible individual at all
            return None
        by = space.step if (cost < low) == rises else -space.step
        layers = space.moves(levels, by)
        if not layers:
            return None
        levels[chance.choice(layers)] += by
    return None


def cost_rises(levels: Levels, space: Space) -> bool:
    """Whether higher levels cost more (entries to keep do, tokens to remove do not).

    Raises ThriftError if a step of all levels, up or down, changes nothing.
    """
    if space.cost is None:
        return True
    less = space.cost(tuple(max(level - space.step, space.low) for level in levels))
    more = space.cost(tuple(min(level + space.step, space.high) for level in levels))
    if not math.isfinite(less):  # less than that is impossible
        less = space.cost(levels)
    if not math.isfinite(more):
        more = space.cost(levels)
    if less == more:
        raise ThriftError("the cost does not change with the levels, so there is nothing to search")
    return less < more


def _or_inf(value: float) -> float:
    return math.inf if math.isnan(value) else value
