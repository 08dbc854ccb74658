"""The per-layer budgets of a plan as integer levels, which a search can move."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..core.errors import ThriftError
from ..core.method import methods
from ..core.plan import Plan, Step
from ..core.tokenmap import TokenMap
from ..core.view import View

PERCENT = 0.01


def tunable(plan: Plan) -> int:
    """The index of the one step whose method has per-layer budgets.

    Raises ThriftError if no step has, or several have: which are to be moved would be a guess.
    """
    found = [i for i, step in enumerate(plan) if parameter(step)]
    if len(found) != 1:
        names = ", ".join(m.name for m in methods() if hasattr(m.cls, "per_layer"))
        problem = "no method" if not found else f"{len(found)} methods"
        raise ThriftError(
            f"the plan '{plan}' has {problem} with budgets layer by layer, tuning takes one; these have them: {names}"
        )
    return found[0]


def parameter(step: Step) -> str | None:
    """The parameter of a step's method that takes a list with one entry a layer, if it has one."""
    name: str | None = getattr(type(step.method), "per_layer", None)
    return name


@dataclass(frozen=True)
class Budgets:
    """A plan with a step whose parameter ``name`` is a list with an entry a layer: its level times ``unit``.

    Counts of tokens have the unit 1, shares of them are in whole percent.
    """

    plan: Plan
    index: int
    name: str
    unit: float

    @property
    def step(self) -> Step:
        return self.plan.steps[self.index]

    @property
    def low(self) -> int:
        return 0 if self.unit == 1 else 1

    def high(self, start: Sequence[int]) -> int:
        """No layer gets more than four times the mean of the start (or what one has already), or more than all."""
        most = max(4 * math.ceil(sum(start) / len(start)), *start)
        return most if self.unit == 1 else min(most, 100)

    def values(self, levels: Sequence[int]) -> list[int] | list[float]:
        """The entries that these levels stand for."""
        return list(levels) if self.unit == 1 else [round(level * self.unit, 2) for level in levels]

    def at(self, levels: Sequence[int]) -> Plan:
        """The plan with these budgets. Raises ThriftError where the method refuses them."""
        return with_step(self.plan, self.index, self.step.changed | {self.name: self.values(levels)})


def with_step(plan: Plan, index: int, params: dict[str, Any]) -> Plan:
    """The plan with these parameters, and no others, in one step."""
    step = plan.steps[index]
    made = Step(step.stage, step.info.make(**params), given=tuple(params))
    return Plan(steps=[*plan.steps[:index], made, *plan.steps[index + 1 :]])


def with_params(plan: Plan, index: int, changes: dict[str, Any]) -> Plan:
    """The plan with some parameters changed in one step.

    A parameter that says the same in another way (``keep`` beside ``r``) is left out, if the method does not take both.
    """
    params = plan.steps[index].changed
    try:
        return with_step(plan, index, params | changes)
    except ThriftError:
        for left_out in params:
            with suppress(ThriftError):
                return with_step(plan, index, {k: v for k, v in params.items() if k != left_out} | changes)
        raise


class Watched:
    """A method that notes in each layer how many tokens it was given, and how many it left."""

    def __init__(self, method: Any) -> None:
        self.method = method
        self.layers = 0
        self.tokens: dict[int, tuple[int, int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def reduce(self, view: View) -> TokenMap | None:
        map: TokenMap | None = self.method.reduce(view)
        self.layers = view.layers
        if map is not None:
            self.tokens[view.layer] = (map.n_in, map.n_out)
        return map


def start_of(plan: Plan, index: int, cost: Callable[[Plan], float]) -> tuple[Budgets, tuple[int, ...], Watched]:
    """The plan's own budgets layer by layer, however it writes them, and the method as it was watched on an input.

    The method is watched: what it removed (or kept) in each layer is the start, if that costs the same as a list. This
    covers numbers, ramps and shares that are left in the end, and numbers larger than what there was to remove.
    Else a number holds for every layer, and a list is taken as it is.

    Args:
        cost: runs a plan on an input and tells what it cost.
    """
    step = plan.steps[index]
    name = parameter(step) or ""
    watched = Watched(step.method)
    paid = cost(Plan(steps=[*plan.steps[:index], Step(step.stage, watched), *plan.steps[index + 1 :]]))
    layers = range(watched.layers)
    value = getattr(step.method, name, None)
    given: list[Any] = [value for _ in layers] if _is_number(value) else value if isinstance(value, list) else []
    if len(given) != len(layers) or not all(map(_is_number, given)):
        given = []
    if given and all(isinstance(v, float) and 0 < v <= 1 for v in given):
        levels = tuple(max(round(float(v) / PERCENT), 1) for v in given)
        return Budgets(with_params(plan, index, {name: given}), index, name, PERCENT), levels, watched
    removed = tuple(a - b for a, b in (watched.tokens.get(i, (0, 0)) for i in layers))
    kept = tuple(watched.tokens[i][1] for i in layers if i in watched.tokens)
    for levels in (removed, tuple(given), kept):
        if len(levels) == len(layers) > 0 and all(isinstance(v, int) for v in levels):
            with suppress(ThriftError):  # the method cannot have meant that
                listed = with_params(plan, index, {name: list(levels)})
                if math.isclose(cost(listed), paid, rel_tol=1e-3):
                    return Budgets(listed, index, name, 1), levels, watched
    raise ThriftError(
        f"what '{step}' does cannot be written as {name}=[...], one entry a layer: give {name} as a number or a list"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
