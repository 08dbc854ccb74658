"""`tune`: the same cost, better spread over the layers. Searches the budgets of one method on the user's own inputs.

``evolution`` is EvoPress (arXiv 2410.14649, see :mod:`tokenthrift.ops.search`) with all schedules at the cost of the
plan's own one, and works for every method that names a parameter ``per_layer``. ``gradient`` is for the methods that
come with a training of their own: DiffRate learns its rates, PYRA its weights.
"""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..api import apply
from ..core.errors import ThriftError, did_you_mean
from ..core.plan import Plan, Step
from ..ops.search import Levels, Space, Stage, level_switch_search
from .budgets import Watched, start_of, tunable, with_params
from .data import default_data, load_data
from .fidelity import Fidelity, Measured, fidelity_of
from .loading import MODELS, Loaded, load_model
from .metrics import bootstrap
from .plans import kind_of
from .progress import progress as show_progress
from .store import Store

SEARCHES = ("evolution", "gradient")
HELD_OUT = 0.25
"""Share of the inputs that the search never sees."""
FIRST_LOOK, LAST_LOOK = 4, 48
"""Inputs that all offspring of a generation are compared on, and those that the best of them meet the parent on: up to
this number, all there are. On a few random ones the search would drift: what is better there is often worse on all."""
FEW = 8
"""With fewer inputs held out, an interval says little."""

Tick = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How to search; see :func:`tune`."""

    generations: int = 40
    offspring: int = 16
    steps: int = 300
    inputs: int = 64
    step: int | None = None
    tolerance: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("generations", "offspring", "steps", "inputs", "step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ThriftError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.tolerance < 1:
            raise ThriftError(f"tolerance {self.tolerance} is outside 0 to 1; 0.02 allows schedules up to 2% cheaper")


@dataclass(frozen=True)
class TuneResult:
    """What a search found. Losses and costs are means over inputs that the search never saw.

    Attributes:
        plan: what to use: ``tuned``, unless the start was no worse on the held-out inputs.
        start, tuned: the plan that the search began with, and the one that it ended with.
        gain: by how much the loss fell from start to tuned, with its 95% interval by bootstrap: (mean, low, high).
        schedules: the budgets of both layer by layer, where there is a list.
        done: how many generations (or steps) were done; ``interrupted`` tells that there would have been more.
        unit: what costs are, FLOPs or cache bytes; ``dense_cost`` is the unmodified model's.
    """

    out: Path
    plan: Plan
    start: Plan
    tuned: Plan
    model: str
    source: str
    search: str
    done: int
    interrupted: bool
    loss: str
    start_loss: float
    tuned_loss: float
    gain: tuple[float, float, float]
    unit: str
    start_cost: float
    tuned_cost: float
    dense_cost: float
    schedules: dict[str, Any]
    searched: int
    held_out: int
    seed: int

    @property
    def headline(self) -> str:
        """The outcome in a sentence."""
        if self.tuned == self.start:
            return "Nothing better was found: the plan stays as it is."
        fell = f"from {self.start_loss:.4g} to {self.tuned_loss:.4g}"
        if self.plan == self.start:
            return f"The plan stays as it is: on the held-out inputs the loss did not fall, but went {fell}."
        mean, low, high = (value / self.start_loss for value in self.gain)
        sure = "" if low > 0 else "; this may be chance"
        return f"The loss falls {fell} on held-out inputs, by {mean:.1%} (95%: {low:.1%} to {high:.1%}){sure}."

    @property
    def caution(self) -> str:
        """What to keep in mind about it, or nothing."""
        if self.held_out < FEW:
            return f"Only {self.held_out} held-out inputs: give more --data for an interval that can be relied on."
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        mean, low, high = self.gain
        return {
            "plan": str(self.plan),
            "start": str(self.start),
            "tuned": str(self.tuned),
            "kept_start": self.plan == self.start,
            "model": self.model,
            "data": self.source,
            "search": self.search,
            "done": self.done,
            "interrupted": self.interrupted,
            "seed": self.seed,
            "inputs": {"searched": self.searched, "held_out": self.held_out},
            "schedules": self.schedules,
            "loss": {
                "what": self.loss,
                "start": self.start_loss,
                "tuned": self.tuned_loss,
                "gain": {"mean": mean, "low": low, "high": high},
            },
            "cost": {
                "unit": self.unit,
                "start": self.start_cost,
                "tuned": self.tuned_cost,
                "dense": self.dense_cost,
            },
            "headline": self.headline,
            "caution": self.caution,
            "out": str(self.out),
        }


def tune(
    plan: Plan | str | Mapping[str, Any],
    model: Any = None,
    data: Sequence[str | Path] | str | Path | None = None,
    out: str | Path = "tokenthrift-tune",
    *,
    processor: Any = None,
    size: int | None = None,
    search: str = "evolution",
    generations: int = 40,
    offspring: int = 16,
    steps: int = 300,
    inputs: int = 64,
    step: int | None = None,
    tolerance: float = 0.02,
    seed: int = 0,
    fresh: bool = False,
    progress: bool = True,
) -> TuneResult:
    """Spread a plan's budget over the layers so that the model's outputs move less, at the same cost.

    An interrupt (Ctrl-C) ends the search early: what it found so far is measured and written like a final result.
    The same call again goes on where it stopped; with more ``generations`` it goes further.

    Args:
        plan: has one method with per-layer budgets (``tome``: ``r``), which the search starts from.
        model: a pack, hub id, folder, or a loaded model with its ``processor``; None = the small pack that fits.
        data: files or folders of unlabelled images or texts; None = what comes with Tokenthrift and Python, which is
            little. A quarter is held out.
        out: folder for results.jsonl (a line a generation), plan.yaml and report.json.
        size: pixels a side to which images are scaled; None = what the model is made for.
        search: ``evolution`` or ``gradient`` (``diffrate``, ``pyra``).
        generations, offspring: of the evolution.
        steps: of the gradient descent.
        inputs: at most so many, drawn by ``seed``.
        step: by how many tokens (or percent) a mutation moves a budget; None = an eighth of the mean budget.
        tolerance: a schedule costs at most as much as the plan's own, and at most this share less.
        fresh: forget what is in ``out``.

    Raises:
        ThriftError: a plan, model or data that cannot be tuned.
    """
    settings = Settings(generations, offspring, steps, inputs, step, tolerance, seed)
    if search not in SEARCHES:
        raise ThriftError(f"unknown search '{search}': {did_you_mean(search, SEARCHES)}")
    plan = Plan.of(plan)
    index = tunable(plan) if search == "evolution" else learnable(plan)
    given = [data] if isinstance(data, str | Path) else data
    found = default_data() if given is None else load_data(given)
    if model is None:
        model = MODELS[kind_of(plan)]
    loaded = load_model(model, processor, size)
    apply(plan, loaded.model)  # unknown stages fail here, before any compute
    fidelity = fidelity_of(loaded, found, plan.steps[index].stage, inputs, seed)
    run = Run(plan, index, loaded, fidelity, settings)
    store = Store(Path(out), fresh)
    with show_progress(progress) as tick:
        run.check_start()
        store.begin({**run.fingerprint(), "search": search})
        outcome = (evolve if search == "evolution" else learn)(run, store, tick)
        result = run.result(outcome, search, found.source, store.path.parent, tick)
    (result.out / "plan.yaml").write_text(plan_yaml(result), encoding="utf-8")
    (result.out / "report.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    return result


def plan_yaml(result: TuneResult) -> str:
    """The plan to use as YAML that ``tokenthrift.apply`` reads, what was found as comments."""
    share = result.tuned_cost / result.dense_cost
    comments = [
        result.headline,
        result.caution,
        f"loss: {result.loss}; {result.unit}: {share:.1%} of the unmodified model's, before tuning "
        f"{result.start_cost / result.dense_cost:.1%}",
        f"start: {result.start}; {result.search}, {result.done} rounds, seed {result.seed}",
        f"model: {result.model}; data: {result.source}",
    ]
    return "".join(f"# {' '.join(line.split())}\n" for line in comments if line) + result.plan.to_yaml()


@dataclass(frozen=True)
class Outcome:
    """What a search ended with: a plan, how many rounds it took, and whether there would have been more."""

    plan: Plan
    done: int
    interrupted: bool = False
    schedules: dict[str, Any] = field(default_factory=dict)


class Run:
    """One plan on one model: measures plans on inputs, each once, and keeps apart those that are held out."""

    def __init__(self, plan: Plan, index: int, loaded: Loaded, fidelity: Fidelity, settings: Settings) -> None:
        self.plan, self.index, self.loaded = plan, index, loaded
        self.fidelity, self.settings = fidelity, settings
        order = random.Random(f"{settings.seed}/held out").sample(range(len(fidelity)), len(fidelity))
        cut = max(1, round(HELD_OUT * len(order)))
        self.held_out, self.searched = order[:cut], order[cut:]
        self.measure: Callable[[Plan, int], Measured] = cache(self.measure_anew)

    def measure_anew(self, plan: Plan, i: int) -> Measured:
        """A plan on the input of this index, run whether it is known or not."""
        with warnings.catch_warnings():  # that a schedule on the way asks for more than there is matters to nobody
            warnings.filterwarnings("ignore", message=".*clipped to half", category=UserWarning)
            return self.fidelity.measure(plan, i)

    @property
    def first(self) -> int:
        """The input on which costs are compared."""
        return self.searched[0]

    def check_start(self) -> None:
        """Raises ThriftError for a plan that saves nothing here."""
        start = self.measure(self.plan, self.first)
        if not start.dense:
            raise ThriftError(f"the plan '{self.plan}' reports no {self.fidelity.unit}: there is no cost to keep to")
        if start.cost >= start.dense:
            raise ThriftError(f"the plan '{self.plan}' saves nothing on this model, so there is no budget to spread")

    def fingerprint(self) -> dict[str, Any]:
        """What makes two runs the same search; more generations only go further."""
        settings = {k: v for k, v in asdict(self.settings).items() if k not in ("generations", "steps")}
        return {
            "plan": str(self.plan),
            "model": self.loaded.identity,
            "data": self.fidelity.fingerprint(),
            **settings,
        }

    def result(self, outcome: Outcome, search: str, source: str, out: Path, tick: Tick) -> TuneResult:
        """Compare what was found with the start on the held-out inputs."""
        pairs = []
        for number, i in enumerate(self.held_out):
            tick("held-out inputs", number, len(self.held_out))
            pairs.append((self.measure(self.plan, i), self.measure(outcome.plan, i)))
        tick("held-out inputs", len(pairs), len(pairs))
        gain = bootstrap({"held out": [a.loss - b.loss for a, b in pairs]}, self.settings.seed)
        return TuneResult(
            out=out,
            plan=outcome.plan if gain[0] > 0 else self.plan,
            start=self.plan,
            tuned=outcome.plan,
            model=self.loaded.label,
            source=source,
            search=search,
            done=outcome.done,
            interrupted=outcome.interrupted,
            schedules=outcome.schedules,
            loss=self.fidelity.loss,
            start_loss=fmean(a.loss for a, _ in pairs),
            tuned_loss=fmean(b.loss for _, b in pairs),
            gain=gain,
            unit=self.fidelity.unit,
            start_cost=fmean(a.cost for a, _ in pairs),
            tuned_cost=fmean(b.cost for _, b in pairs),
            dense_cost=fmean(a.dense for a, _ in pairs),
            searched=len(self.searched),
            held_out=len(self.held_out),
            seed=self.settings.seed,
        )


# ---- by evolution ---------------------------------------------------------------------------------------------------


def evolve(run: Run, store: Store, tick: Tick) -> Outcome:
    """Level-switch search among the schedules that cost as much as the plan's own; goes on where the store ends."""
    settings = run.settings
    # Not through the cache, which would not run a plan that it knows.
    budgets, start, watched = start_of(run.plan, run.index, lambda plan: run.measure_anew(plan, run.first).cost)
    check_something_left(run, watched)

    @cache
    def at(levels: Levels) -> Plan:
        return run.plan if levels == start else budgets.at(levels)

    def cost(levels: Levels) -> float:
        try:
            return run.measure(at(levels), run.first).cost
        except ThriftError:  # a schedule that the method refuses
            return math.inf

    def fitness(levels: Levels, batch: tuple[int, ...]) -> float:
        return fmean(run.measure(at(levels), run.searched[i]).loss for i in batch)

    paid = cost(start)
    space = Space(
        low=min(budgets.low, *start),
        high=budgets.high(start),
        step=settings.step or max(round(fmean(start) / 8), 1),
        cost=cost,
        band=((1 - settings.tolerance) * paid, paid * (1 + 1e-9)),
    )
    rows = [row for key, row in store.rows.items() if key.startswith("generation")][: settings.generations]
    parent, done, interrupted = (tuple(rows[-1]["levels"]) if rows else start), len(rows), False
    search = level_switch_search(
        parent,
        fitness,
        len(run.searched),
        space,
        generations=settings.generations,
        offspring=settings.offspring,
        stages=(Stage(max(settings.offspring // 4, 1), FIRST_LOOK), Stage(1, LAST_LOOK)),
        seed=settings.seed,
        done=done,
    )
    try:
        tick(f"{run.loaded.label}: {run.plan}", 0, settings.generations)
        for g in search:
            if g.number == 1 and not g.offspring:
                raise ThriftError(
                    f"there is no other schedule that costs as much as '{run.plan}' or up to {settings.tolerance:.1%} "
                    "less: allow more with a higher tolerance, or a smaller step"
                )
            store.add({"key": f"generation {g.number}", **asdict(g), "cost": cost(g.levels)})
            parent, done = g.levels, g.number
            tick(f"loss {g.fitness:.4g}, {run.plan}", g.number, settings.generations)
    except KeyboardInterrupt:
        interrupted = True
    schedules = {"parameter": budgets.name, "start": budgets.values(start), "tuned": budgets.values(parent)}
    return Outcome(at(parent), done, interrupted, schedules)


def check_something_left(run: Run, watched: Watched) -> None:
    """Raises ThriftError for a plan that leaves an encoder one patch, or none."""
    prefix = getattr(run.fidelity, "prefix", None)
    fewest = min(after for _, after in watched.tokens.values())
    if prefix is not None and fewest <= prefix + 1:
        raise ThriftError(
            f"the plan '{run.plan}' leaves {fewest} of {max(before for before, _ in watched.tokens.values())} tokens: "
            "there is nothing to spread, remove fewer"
        )


# ---- by gradients ---------------------------------------------------------------------------------------------------


def learn(run: Run, store: Store, tick: Tick) -> Outcome:
    """The training that belongs to the method itself."""
    step, steps = run.plan.steps[run.index], run.settings.steps
    tick(f"{run.loaded.label}: {run.plan}", 0, steps)

    def progress(done: int, total: int, loss: float = math.nan) -> None:
        tick(f"{run.loaded.label}: {run.plan}" if math.isnan(loss) else f"loss {loss:.4g}, {run.plan}", done, total)

    settings = {"steps": steps, "seed": run.settings.seed, "progress": progress}
    tuned = LEARNERS[step.name](run, _batches(run), store.path.parent, settings)
    changed = {k: v for k, v in tuned.steps[run.index].params.items() if step.params.get(k) != v}
    store.add({"key": "learned", "steps": steps, **changed})
    return Outcome(tuned, steps, schedules=changed)


def learnable(plan: Plan) -> int:
    """The index of the one step whose method comes with a training of its own."""
    found = [i for i, step in enumerate(plan) if step.name in LEARNERS]
    if len(found) != 1:
        raise ThriftError(
            f"the plan '{plan}' has {len(found) or 'no'} method{'s' * (len(found) > 1)} that can be trained, gradient "
            f"search takes one of {', '.join(LEARNERS)}; evolution takes every method with budgets layer by layer"
        )
    return found[0]


def _learn_rates(run: Run, batches: list[Tensor], out: Path, settings: dict[str, Any]) -> Plan:
    """DiffRate: numbers of tokens to keep, at the share of FLOPs that the plan's own numbers cost."""
    from ..models.learn_rates import learn_rates, write_rates

    start = run.measure(run.plan, run.first)
    learned = learn_rates(run.loaded.model, batches, flops=start.cost / start.dense, **settings)
    write_rates(learned, out / "rates.json")
    return with_params(run.plan, run.index, {"prune": learned["prune"], "merge": learned["merge"]})


def _learn_pyra(run: Run, batches: list[Tensor], out: Path, settings: dict[str, Any]) -> Plan:
    """PYRA: weights that modulate what is merged, of the same tokens at the same cost."""
    from ..models.learn_pyra import learn_pyra

    steps = list(run.plan)
    step, path = steps[run.index], (out / "pyra.safetensors").resolve()
    learned = learn_pyra(run.loaded.model, batches, step.method, out=path, **settings)
    steps[run.index] = Step(step.stage, learned)
    return Plan(steps=steps)


LEARNERS: dict[str, Callable[[Run, list[Tensor], Path, dict[str, Any]], Plan]] = {
    "diffrate": _learn_rates,
    "pyra": _learn_pyra,
}


def _batches(run: Run, size: int = 8) -> list[Tensor]:
    """The searched images in batches."""
    inputs = [run.fidelity.inputs[i] for i in run.searched]
    images = [x["pixel_values"] for x in inputs if isinstance(x, dict) and "pixel_values" in x]
    if not images or len({image.shape for image in images}) > 1:
        raise ThriftError("gradient search trains on images, all of one size after the image processor")
    return [torch.cat(images[i : i + size]) for i in range(0, len(images), size)]
