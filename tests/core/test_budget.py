"""Budgets, schedules and the integer rounding beneath them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenthrift.core.budget import Budget, Schedule, share_out, top_p_counts
from tokenthrift.core.errors import ThriftError

weights = st.lists(st.floats(0, 100) | st.integers(0, 5), min_size=1, max_size=8)


# ---- Budget ----------------------------------------------------------------------------------------------------------


def test_a_float_is_a_ratio_and_an_int_a_count():
    assert Budget.of(0.25) == Budget(ratio=0.25)
    assert Budget.of(512) == Budget(count=512)
    assert Budget.of(1.0) == Budget(ratio=1.0)
    assert Budget.of(1) == Budget(count=1)
    assert Budget.of(Budget(count=3)) == Budget(count=3)
    assert (str(Budget.of(0.25)), str(Budget.of(512))) == ("0.25", "512")


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, True, False, 0, -1, 0.0, -0.5, 1.01, "512", None, [1]]
)
def test_what_is_no_budget_is_refused_in_one_line(value):
    for make in (Budget.of, lambda v: Budget(ratio=v), lambda v: Budget(count=v)):
        with pytest.raises(ThriftError) as error:
            make(value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [{}, {"ratio": 0.5, "count": 3}, {"count": 2.0}, {"count": 2.5}])
def test_a_budget_is_exactly_one_of_ratio_and_count(wrong):
    with pytest.raises(ThriftError, match="count"):
        Budget(**wrong)


def test_ratios_round_half_up_and_keep_at_least_one():
    assert [Budget.of(0.5).tokens(n) for n in range(6)] == [0, 1, 1, 2, 2, 3]
    assert Budget.of(0.25).tokens(10) == 3
    assert Budget.of(0.001).tokens(10) == 1
    assert Budget.of(0.001).tokens(0) == 0


def test_a_count_above_the_length_keeps_all():
    assert Budget.of(512).tokens(7) == 7
    assert Budget.of(512).tokens(0) == 0
    assert Budget.of(512).tokens(1000) == 512


@given(st.floats(0, 1, exclude_min=True) | st.integers(1, 1000), st.integers(0, 2000))
def test_budgets_stay_between_one_and_all(value, n):
    kept = Budget.of(value).tokens(n)
    assert min(n, 1) <= kept <= n
    if isinstance(value, float) and kept > 1:
        assert abs(kept - value * n) <= 0.5 + 1e-9
    assert Budget.of(1.0).tokens(n) == n


def test_budgets_of_a_batch():
    lengths = torch.tensor([[0, 1], [10, 11]])
    kept = Budget.of(0.5).tokens_of(lengths)
    assert kept.tolist() == [[0, 1], [5, 6]]
    for t in (lengths, lengths.to(torch.int32), lengths[:0]):
        assert Budget.of(4).tokens_of(t).dtype == torch.int64
        assert Budget.of(4).tokens_of(t).shape == t.shape


# ---- share_out -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 200), weights)
def test_shares_sum_exactly_and_stay_within_one_of_proportional(total, w):
    parts = share_out(total, w)
    assert sum(parts) == total
    mass = sum(w)
    for part, weight in zip(parts, w, strict=True):
        assert abs(part - (total * (weight / mass) if mass else total / len(w))) < 1 + 1e-9


@given(st.integers(0, 60), weights, st.data())
def test_caps_and_floors_hold_and_the_sum_is_as_close_as_they_allow(total, w, data):
    caps = data.draw(st.lists(st.integers(0, 30), min_size=len(w), max_size=len(w)))
    floor = data.draw(st.integers(0, 10))
    parts = share_out(total, w, caps, floor)
    low = [min(floor, cap) for cap in caps]
    assert all(a <= p <= c for a, p, c in zip(low, parts, caps, strict=True))
    assert sum(parts) == min(max(total, sum(low)), sum(caps))


@given(st.integers(0, 60), weights, st.data())
def test_units_that_no_bound_holds_stay_in_proportion(total, w, data):
    caps = data.draw(st.lists(st.integers(0, 30), min_size=len(w), max_size=len(w)))
    floor = data.draw(st.integers(0, 10))
    parts = share_out(total, w, caps, floor)
    free = [i for i, p in enumerate(parts) if min(floor, caps[i]) + 1 < p < caps[i] - 1 and w[i] > 1e-6]
    rate = [(parts[i] / w[i], 1 / w[i]) for i in free]  # tokens per weight, and what one token of rounding is of it
    for a, da in rate:
        for b, db in rate:
            assert abs(a - b) <= (da + db) * (1 + 1e-9)


def test_shares_by_hand():
    assert share_out(10, [6.1, 3.9]) == [6, 4]  # the larger remainder, not the larger weight
    assert share_out(10, [0.5] + [0.01] * 50)[0] == 5
    assert share_out(100, [9, 1], floor=10) == [90, 10]  # a floor that nobody needs changes nothing
    assert share_out(100, [99, 1], floor=10) == [90, 10]
    assert share_out(10, [3, 1], caps=[4, 10]) == [4, 6]
    assert share_out(10, [1, 0], caps=[4, 10]) == [4, 6]  # also to a unit without weight, if nobody else can
    assert share_out(10, [1, 1], caps=[4, 4]) == [4, 4]
    assert share_out(3, [1, 1], floor=5) == [3, 3]  # never more than the total for one unit
    assert share_out(3, [0, 0, 0]) == [1, 1, 1]
    assert share_out(0, [1, 2]) == [0, 0]
    assert share_out(5, []) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_weights_that_are_none(bad):
    with pytest.raises(ThriftError, match="finite"):
        share_out(10, [1.0, bad])
    with pytest.raises(ThriftError, match="finite"):
        Schedule.listed([1.0, bad])


# ---- Schedule --------------------------------------------------------------------------------------------------------


schedules = (
    st.just(Schedule.constant())
    | st.floats(-1, 1).map(Schedule.linear)
    | st.floats(1, 100).map(Schedule.pyramid)
    | weights.filter(any).map(Schedule.listed)
)


@given(schedules, st.floats(0, 100), st.integers(1, 12))
def test_schedules_keep_the_total(schedule, mean, n):
    parts = schedule.spread(mean, n)
    assert len(parts) == n and min(parts) >= 0
    assert sum(parts) == math.floor(mean * n + 0.5)


@given(schedules, st.integers(0, 40), st.integers(1, 12), st.integers(0, 20))
def test_schedules_respect_cap_and_floor(schedule, mean, n, floor):
    parts = schedule.spread(mean, n, cap=30, floor=floor)
    assert all(floor <= p <= 30 for p in parts) or (floor > mean * n and len(parts) == n)
    assert sum(parts) == min(max(mean * n, floor * n), 30 * n)


def test_schedules_by_hand():
    assert Schedule.constant().spread(2.5, 4) == [3, 3, 2, 2]
    assert Schedule.linear(-1).spread(4, 5) == [8, 6, 4, 2, 0]
    assert Schedule.linear(0.5).spread(4, 5) == [2, 3, 4, 5, 6]
    assert Schedule.pyramid(4).spread(8, 3) == [14, 8, 2]
    assert Schedule.pyramid(1) == Schedule.constant()
    assert Schedule.listed([3, 1]).spread(2, 4) == [6, 2, 0, 0]
    assert Schedule.listed([1, 1, 5]).spread(3, 2) == [3, 3]
    assert Schedule.linear(1).spread(7, 1) == [7]
    assert Schedule.constant().spread(7, 0) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: Schedule.linear(1.5),
        lambda: Schedule.linear(math.nan),
        lambda: Schedule.pyramid(0.5),
        lambda: Schedule.pyramid(math.nan),
        lambda: Schedule.pyramid(math.inf),
        lambda: Schedule.listed([]),
        lambda: Schedule.listed([0, 0]),
    ],
)
def test_schedules_that_are_none(make):
    with pytest.raises(ThriftError) as error:
        make()
    assert "\n" not in str(error.value)


# ---- top-p -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=6, max_size=6), min_size=1, max_size=3),
    st.sampled_from([0.125, 0.25, 0.5, 0.75, 0.9375]),
)
def test_top_p_is_the_smallest_count_that_holds_the_share(rows, p):
    counts = top_p_counts(torch.tensor(rows), p)
    assert counts.dtype == torch.int64
    for row, count in zip(rows, counts.tolist(), strict=True):
        ordered = sorted(row, reverse=True)
        assert sum(ordered[:count]) >= p * sum(row)
        assert count == 1 or sum(ordered[: count - 1]) < p * sum(row)


def test_top_p_of_everything_keeps_everything():
    scores = torch.rand(2, 100_000, generator=torch.Generator().manual_seed(0))
    assert top_p_counts(scores, 1.0).tolist() == [100_000, 100_000]
    assert top_p_counts(torch.tensor([1.0, 0.0]), 1).tolist() == 2


def test_top_p_edges():
    assert top_p_counts(torch.zeros(2, 3), 0.5).tolist() == [1, 1]
    assert top_p_counts(torch.zeros(2, 0), 0.5).tolist() == [0, 0]
    assert top_p_counts(torch.tensor([0.5, 0.25, 0.25]).bfloat16(), 0.6).tolist() == 2
    for p in (0, -0.1, 1.1, math.nan):
        with pytest.raises(ThriftError, match="top-p"):
            top_p_counts(torch.ones(3), p)
