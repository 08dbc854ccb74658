"""What is verified, given chances and measured times."""

from __future__ import annotations

import itertools

import pytest

from tokenthrift.core.draft import NOTHING, Draft
from tokenthrift.decoding.planner import Planner, StepTimes


def timed(seconds: dict[int, float], **kwargs) -> Planner:
    planner = Planner(**{"free": True, **kwargs})
    for width, took in seconds.items():
        for _ in range(3):
            planner.times.note(width, took)
    return planner


def test_times_are_interpolated_and_extrapolated():
    times = StepTimes()
    assert times(1) == 1
    assert times(11) > times(1)
    for width, took in ((1, 1.0), (8, 2.4)):
        assert not times.knows(width)
        for _ in range(3):
            times.note(width, took)
        assert times.knows(width)
    assert times(1) == pytest.approx(1.0)
    assert times(8) == pytest.approx(2.4)
    assert times(3) == pytest.approx(1.4)
    assert times(16) > 2.4
    for _ in range(6):
        times.note(1, 3.0)  # what was long ago is forgotten
    assert times(1) == pytest.approx(3.0)


def test_one_slow_forward_does_not_scare():
    times = StepTimes()
    for _ in range(3):
        times.note(1, 1.0)
    times.note(4, 9.0)
    assert times(4) < 2


@pytest.mark.parametrize(("cost", "length"), [(0.05, 4), (0.3, 2), (1.0, 0)])
def test_a_guess_stays_as_long_as_it_pays(cost, length):
    planner = timed({width: 1 + cost * (width - 1) for width in (1, 2, 3, 4, 6, 8, 12)})
    draft = Draft.chain([5, 6, 7, 8, 9, 1], [0.9, 0.7, 0.2, 0.15, 0.02, 0.01])
    rates = [(1 + sum(draft.chances[:n])) / (1 + cost * n) for n in range(7)]
    [cut] = planner.cut([draft])
    assert len(cut) == length == max(range(7), key=rates.__getitem__)
    assert list(cut.tokens) == list(draft.tokens[:length])


def test_the_likeliest_guesses_of_all_rows_and_branches_go_first():
    planner = timed({1: 1.0, 2: 1.1, 3: 1.2, 4: 1.3, 6: 1.6, 8: 4.0, 12: 9.0})
    likely = Draft([1, 2, 3, 4], [-1, -1, 0, 2], [0.9, 0.05, 0.8, 0.7])
    unlikely = Draft.chain([7, 8], [0.1, 0.05])
    first, second, done = planner.cut([likely, unlikely, None])
    assert list(first.tokens) == [1, 3, 4]
    assert first.is_chain
    assert len(second) == 0
    assert done is None


def test_nothing_is_weighed_before_plain_steps_are_timed():
    planner = timed({})
    assert planner.cut([Draft.chain([1], [0.99])]) == [NOTHING]
    whole = Draft.chain([1, 2])
    assert planner.cut([whole]) == [whole]  # says nothing of its chances: taken as it is


def test_rows_in_step_get_chains_of_one_length():
    planner = timed({width: 1 + 0.05 * width for width in (1, 2, 3, 4, 6, 8, 12)}, free=False)
    tree = Draft([1, 2, 3], [-1, -1, 1], [0.3, 0.6, 0.5])
    chain = Draft.chain([4, 5, 6], [0.9, 0.8, 0.7])
    first, second, done = planner.cut([tree, chain, None])
    assert (list(first.tokens), list(second.tokens), done) == ([2, 3], [4, 5], None)
    assert [len(d) for d in planner.cut([tree, NOTHING])] == [0, 0]


def test_drafting_that_loses_pauses_longer_each_time_and_comes_back():
    planner = timed({1: 1.0, 2: 1.1})
    draft = Draft.chain([1], [0.9])
    pauses = []
    for _ in range(3):
        for _ in itertools.count():
            if planner.rests():
                break
            planner.note([draft], 1, draft_seconds=1.0, seconds=1.1)  # slow to draft, and never right
        pauses.append(1)
        while planner.rests():
            pauses[-1] += 1
            planner.note([NOTHING], 1, 0.0, 1.0)
    assert pauses[0] < pauses[1] < pauses[2]
    for _ in range(50):
        assert not planner.rests()
        planner.note([draft], 2, draft_seconds=0.01, seconds=1.1)
