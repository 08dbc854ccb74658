"""Level-switch search: what mutations conserve, that no generation is a step back, and that toys are solved."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenthrift.core.errors import ThriftError
from tokenthrift.ops.search import Space, Stage, brood, cost_rises, level_switch_search, mutate

vectors = st.lists(st.integers(2, 8), min_size=2, max_size=12).map(tuple)


def flops(levels, tokens=100):
    """Of an encoder whose layers remove so many tokens each: what goes early is missing in all later layers."""
    total = 0
    for level in levels:
        total += tokens
        tokens -= level
    return float(total + tokens)


def far_from(target, batch_matters=0.0):
    def fitness(levels, batch):
        wrong = sum((a - b) ** 2 for a, b in zip(levels, target, strict=True))
        return wrong + batch_matters * math.sin(sum(batch) + sum(i * level for i, level in enumerate(levels)))

    return fitness


def search(start, fitness, space=None, **more):
    settings = {"inputs": 10, "generations": 60, "offspring": 8, **more}
    return list(level_switch_search(start, fitness, space=space or Space(), **settings))


@given(vectors, st.integers(0, 1000), st.integers(1, 3))
def test_switches_keep_the_sum_and_the_bounds(parent, seed, step):
    child = mutate(parent, Space(low=1, high=9, step=step), random.Random(seed))
    if child is not None:
        assert sum(child) == sum(parent)
        assert all(1 <= level <= 9 for level in child)
        assert all((a - b) % step == 0 for a, b in zip(child, parent, strict=True))
        assert sum(abs(a - b) for a, b in zip(child, parent, strict=True)) <= 2 * 3 * step


@given(vectors, st.integers(0, 1000))
def test_mutations_stay_in_the_band_of_costs(parent, seed):
    centre = flops(parent)
    space = Space(high=20, cost=flops, band=(0.99 * centre, centre))
    child = mutate(parent, space, random.Random(seed), rises=cost_rises(parent, space))
    assert child is None or child in space


def test_every_individual_of_a_search_costs_the_same():
    start = (5,) * 8
    space = Space(high=30, cost=flops, band=(0.99 * flops(start), flops(start)))
    seen = set()

    def fitness(levels, batch):
        seen.add(levels)
        return far_from((9, 8, 7, 3, 2, 2, 1, 1))(levels, batch)

    search(start, fitness, space)
    assert len(seen) > 50
    assert all(levels in space for levels in seen)
    assert len({sum(levels) for levels in seen}) > 1  # fewer tokens but earlier is a choice too


@given(vectors, st.integers(0, 100))
def test_offspring_differ(parent, seed):
    children = brood(parent, Space(), 10, random.Random(seed))
    assert len(set(children)) == len(children) <= 10
    assert parent not in children


def test_no_offspring_more_than_there_are():
    assert set(brood((1, 1), Space(low=0, high=2), 10, random.Random(0))) == {(0, 2), (2, 0)}
    assert brood((0, 0), Space(), 10, random.Random(0)) == []
    assert brood((3,), Space(), 10, random.Random(0)) == []
    [only] = search((0, 0), far_from((1, 1)), generations=1)
    assert (only.levels, only.offspring) == ((0, 0), 0)


@given(st.integers(0, 20))
def test_no_generation_is_worse_than_its_parent(seed):
    for g in search((4,) * 6, far_from((9, 1, 2, 2, 9, 1), batch_matters=5), seed=seed, generations=15):
        assert g.fitness <= g.parent_fitness


def test_the_parent_stays_when_nothing_is_better():
    generations = search((4, 4, 4), lambda levels, batch: 1.0)
    assert {g.levels for g in generations} == {(4, 4, 4)}


def test_not_a_number_is_worst():
    last = search((4, 4, 4), lambda levels, batch: math.nan if levels != (4, 4, 4) else 7.0)[-1]
    assert last.levels == (4, 4, 4)


def test_deterministic():
    first, again, other = (
        search((4,) * 6, far_from((9, 1, 2, 2, 9, 1), batch_matters=2), seed=s, generations=12) for s in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_taken_up_again_it_is_the_same_search():
    fitness = far_from((9, 1, 2, 2, 9, 1), batch_matters=2)
    whole = search((4,) * 6, fitness, generations=12)
    rest = search(whole[4].levels, fitness, generations=12, done=5)
    assert whole[5:] == rest
    assert search(whole[-1].levels, fitness, generations=12, done=12) == []


def test_finds_the_optimum_of_a_fixed_sum():
    target = (12, 0, 3, 7, 1, 1, 8, 0)
    assert search((4,) * 8, far_from(target), generations=150)[-1].levels == target


def test_finds_the_optimum_of_a_fixed_cost():
    """The best of all vectors with the cost of the start, found by trying them all."""
    start, space = (5, 5, 5, 5), Space(high=12, cost=flops, band=(flops((5,) * 4) - 2, flops((5,) * 4)))
    fitness = far_from((11, 4, 2, 0))
    every = [(a, b, c, d) for a in range(13) for b in range(13) for c in range(13) for d in range(13)]
    best = min((v for v in every if v in space), key=lambda v: fitness(v, ()))
    found = search(start, fitness, space, generations=100, offspring=16)[-1].levels
    assert fitness(found, ()) == fitness(best, ())


def test_stages_grow_and_the_parent_joins_the_last():
    calls = []

    def fitness(levels, batch):
        calls.append((levels, batch))
        return far_from((9, 1, 2))(levels, batch)

    search((4, 4, 4), fitness, generations=1, offspring=6, stages=(Stage(3, 2), Stage(1, 5)))
    sizes = [len(batch) for _, batch in calls]
    assert sizes == [2] * 6 + [5] * 4
    assert [levels for levels, _ in calls].count((4, 4, 4)) == 1
    assert calls[6][0] == (4, 4, 4)
    assert len({batch for _, batch in calls}) == 2  # all of one stage see the same inputs
    assert all(set(batch) <= set(range(10)) for _, batch in calls)


def test_steps():
    last = search((20,) * 4, far_from((40, 0, 20, 20)), Space(step=5), generations=60)[-1]
    assert last.levels == (40, 0, 20, 20)


def test_which_way_costs_go():
    assert not cost_rises((5, 5), Space(cost=flops))
    assert cost_rises((5, 5), Space(cost=lambda levels: float(sum(levels))))
    assert cost_rises((5, 5), Space(high=5, cost=lambda levels: float(sum(levels))))
    forbidden = Space(cost=lambda levels: math.inf if max(levels) > 5 else float(sum(levels)))
    assert cost_rises((5, 5), forbidden)
    with pytest.raises(ThriftError, match="does not change"):
        cost_rises((5, 5), Space(cost=lambda levels: 1.0))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stages": ()}, "stages"),
        ({"stages": (Stage(2, 2),)}, "the last one survivor"),
        ({"stages": (Stage(2, 0), Stage(1, 2))}, "stages"),
        ({"inputs": 0}, "at least one input"),
        ({"offspring": 0}, "one offspring"),
        ({"space": Space(low=5)}, "cannot start"),
        ({"space": Space(cost=flops, band=(0, 1))}, "cannot start"),
    ],
)
def test_refuses(change, says):
    with pytest.raises(ThriftError, match=says):
        search((4, 4, 4), far_from((1, 2, 3)), **change)


def test_refuses_an_empty_space():
    with pytest.raises(ThriftError, match="step"):
        Space(step=0)
