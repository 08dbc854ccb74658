"""Which of a plan's parameters is a budget layer by layer, and what list says the same as the plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch

import tokenthrift as tt
from tokenthrift.bench.budgets import start_of, tunable, with_params
from tokenthrift.core import method as registry
from tokenthrift.core.errors import ThriftError
from tokenthrift.core.method import find, method
from tokenthrift.core.plan import Plan
from tokenthrift.core.tokenmap import TokenMap

from .tiny import tiny_model
from .tiny_vision import tiny_encoder


@pytest.fixture
def last_entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache method that takes a budget a layer, as a count or as a share."""
    find("tome")
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))

    @method("last_entries", stage="cache", paper="A toy", needs=("keys", "layer", "layers"))
    class LastEntries:
        """Keep the last entries."""

        per_layer: ClassVar[str] = "budget"
        budget: Any = 16
        half: bool = False

        def reduce(self, view: Any) -> TokenMap:
            batch, heads, n, _ = view.keys.shape
            mine = self.budget[view.layer] if isinstance(self.budget, list) and not self.half else self.budget
            keep = n // 2 if self.half else round(mine * n) if isinstance(mine, float) else min(mine, n)
            return TokenMap.select(torch.arange(n - keep, n).expand(batch, heads, keep), n)

    yield


def flops_of(model: Any) -> Any:
    image = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))

    def cost(plan: Plan) -> float:
        with torch.no_grad(), tt.apply(plan, model) as session:
            model(image)
        return session.report().flops

    return cost


def bytes_of(model: Any, tokens: int = 40) -> Any:
    def cost(plan: Plan) -> float:
        with torch.no_grad(), tt.apply(plan, model) as session:
            model(torch.arange(tokens)[None], use_cache=True)
        return session.report().stages["cache"].bytes_after

    return cost


@pytest.mark.parametrize(
    ("plan", "levels"),
    [
        ("vision=tome(r=6)", (6, 6, 6, 6)),
        ("vision=tome(keep=0.5)", (5, 5, 4, 4)),
        ("vision=tome(r=(4, -1.0))", (8, 5, 2, 0)),
        ("vision=tome(r=[9, 0, 3, 1])", (9, 0, 3, 1)),
        ("vision=tome(r=[9, 2])", (9, 2, 0, 0)),
        ("vision=tome(r=[30, 1, 1, 1])", (18, 1, 1, 1)),  # what there was to remove
    ],
)
def test_the_plans_own_schedule(plan: str, levels: tuple[int, ...]) -> None:
    cost = flops_of(tiny_encoder())
    budgets, start, watched = start_of(Plan.parse(plan), 0, cost)
    assert start == levels
    assert watched.layers == 4
    assert cost(budgets.at(start)) == cost(Plan.parse(plan))
    assert str(budgets.at((3, 2, 1, 0))) == "vision=tome(r=[3, 2, 1, 0])"
    assert budgets.at((3, 2, 1, 0)) == Plan.parse("vision=tome(r=[3, 2, 1, 0])")


def test_other_parameters_and_steps_stay() -> None:
    plan = Plan.parse("vision=tome(keep=0.4, prop_attn=False)")
    budgets, start, _ = start_of(plan, 0, flops_of(tiny_encoder()))
    assert str(budgets.at(start)) == f"vision=tome(r={list(start)}, prop_attn=False)"
    plan = Plan.parse("text=truncate(rate=0.5) vision=tome(r=3)")
    assert tunable(plan) == 1
    assert str(with_params(plan, 1, {"r": [1]})) == "text=truncate(rate=0.5) vision=tome(r=[1])"


@pytest.mark.usefixtures("last_entries")
@pytest.mark.parametrize(
    ("plan", "levels", "values"),
    [
        ("cache=last_entries()", (16, 16), [16, 16]),
        ("cache=last_entries(budget=[10, 20])", (10, 20), [10, 20]),
        ("cache=last_entries(budget=0.25)", (25, 25), [0.25, 0.25]),
        ("cache=last_entries(budget=[0.1, 0.55])", (10, 55), [0.1, 0.55]),
    ],
)
def test_budgets_of_other_stages(plan: str, levels: tuple[int, ...], values: list[float]) -> None:
    budgets, start, _ = start_of(Plan.parse(plan), 0, bytes_of(tiny_model()))
    assert start == levels
    assert budgets.values(start) == values
    assert budgets.high(start) <= 100
    assert all(0 < v <= 1 for v in budgets.values((budgets.low, 100)) if isinstance(v, float))


@pytest.mark.usefixtures("last_entries")
def test_what_is_seen_to_be_kept_can_be_the_budget() -> None:
    plan = Plan.parse("cache=last_entries(budget=[12], half=true)")  # a list for one layer of two
    budgets, start, _ = start_of(plan, 0, bytes_of(tiny_model()))
    assert start == (20, 20)
    assert budgets.step.method.half


def test_no_list_says_the_same() -> None:
    with pytest.raises(ThriftError, match=r"give r as a number or a list"):
        start_of(Plan.parse("vision=tome(keep=0.5)"), 0, lambda plan: 1.0)


def test_plans_that_cannot_be_tuned() -> None:
    with pytest.raises(ThriftError, match=r"no method with budgets layer by layer.*tome"):
        tunable(Plan.parse("cache=knorm(budget=40)"))
    with pytest.raises(ThriftError, match=r"2 methods.*takes one"):
        tunable(Plan.parse("vision=tome() vision=tome(r=2)"))
    with pytest.raises(ThriftError, match="no method"):
        tunable(Plan())


def test_a_contradiction_that_no_omission_mends() -> None:
    with pytest.raises(ThriftError, match="not both"):
        with_params(Plan.parse("vision=tome(keep=0.4)"), 0, {"r": -1})


PER_LAYER = [m.name for m in tt.methods("vision") if hasattr(m.cls, "per_layer")]


@pytest.mark.parametrize("name", PER_LAYER)
def test_every_method_with_budgets_a_layer_has_a_start(name: str) -> None:
    """As its plan stands, whatever its parameters are; and the list is another way to say it."""
    cost, plan = flops_of(tiny_encoder(layers=12)), Plan.parse(f"vision={name}()")
    budgets, start, _ = start_of(plan, 0, cost)
    assert len(start) == 12
    assert cost(budgets.at(start)) == pytest.approx(cost(plan), rel=1e-3)
    fewer = tuple(max(level - 1, 0) for level in start)
    assert cost(budgets.at(fewer)) != cost(plan)
