from hypothesis import given
from hypothesis import strategies as st

from tokenthrift.bench.pareto import pareto_front, recommend

numbers = st.integers(0, 6).map(float)


@given(st.integers(1, 3).flatmap(lambda d: st.lists(st.tuples(*[numbers] * d), max_size=12)))
def test_front_equals_brute_force(points: list[tuple[float, ...]]) -> None:
    def beaten(p: tuple[float, ...]) -> bool:
        return any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in points)

    assert pareto_front(points) == [i for i, p in enumerate(points) if not beaten(p)]


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12), numbers)
def test_recommended_is_cheapest_within_the_loss(points: list[tuple[float, float]], max_loss: float) -> None:
    losses, costs = [p[0] for p in points], [p[1] for p in points]
    chosen = recommend(losses, costs, max_loss)
    fit = [p for p in points if p[0] <= max_loss]
    if not fit:
        assert chosen is None
        return
    assert chosen is not None
    assert losses[chosen] <= max_loss
    assert costs[chosen] == min(cost for _, cost in fit)
    assert losses[chosen] == min(loss for loss, cost in fit if cost == costs[chosen])
