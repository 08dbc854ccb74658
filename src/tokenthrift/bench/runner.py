"""`bench`: measure every plan against the unmodified model in the same run, resume where an earlier run stopped."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..api import apply
from ..core.errors import ThriftError
from ..core.plan import Plan
from ..models.decoder import context_length
from ..models.visual_processor import VisualProcessor
from . import plans as plan_sets
from .data import Data, default_data, load_data, names
from .grids import Grid, grids
from .images import VisionBench
from .language import LanguageBench, without_decode
from .loading import MODELS, Loaded, digest, load_model
from .metrics import common_prefix
from .progress import progress as show_progress
from .seeing import Asked, questions
from .store import Store
from .suites import AnySuite, find_suite
from .summary import PlanResult, summarise_language, summarise_vision
from .tasks import Case, Suite
from .visual import VisualBench

# What a method that does not fit a model or an input may raise. Not OSError, MemoryError or an interrupt: those end it.
_FAILURES = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)


QUESTIONS_A_SCENE = 7
"""At most: one of every kind."""


@dataclass
class Section:
    """One model and the plans measured on it. ``kind`` is ``language``, ``vision`` or ``visual``, both together."""

    kind: str
    model: str
    results: list[PlanResult]
    cases: list[Case] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    runner: Any = None
    grids: list[Grid] = field(default_factory=list)

    @property
    def best(self) -> PlanResult:
        """The recommended plan; the unmodified model if no plan qualifies."""
        return next(r for r in self.results if r.recommended)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data: dict[str, Any] = {"kind": self.kind, "model": self.model, "recommended": self.best.name}
        if self.grids:
            data["grids"] = [asdict(grid) for grid in self.grids]
        return {**data, "plans": [r.to_dict() for r in self.results]}


@dataclass
class BenchResult:
    """What a run found, and where its files are: results.jsonl, plan.yaml and report.html in ``out``."""

    out: Path
    sections: list[Section]
    suite: str
    seed: int
    max_quality_loss: float
    source: str
    machine: dict[str, str]
    command: str
    date: str
    rows: list[dict[str, Any]]
    note: str = ""

    @property
    def plan(self) -> Plan:
        """The plan recommended for the first model."""
        return Plan.parse(self.sections[0].best.plan)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "suite": self.suite,
            "seed": self.seed,
            "max_quality_loss": self.max_quality_loss,
            "data": self.source,
            "machine": self.machine,
            "command": self.command,
            "out": str(self.out),
            "sections": [s.to_dict() for s in self.sections],
        }


def bench(
    model: Any = None,
    data: Sequence[str | Path] | str | Path | None = None,
    plans: Sequence[Plan | str | Mapping[str, Any]] | Plan | str | None = None,
    suite: str | AnySuite = "quick",
    out: str | Path = "tokenthrift-bench",
    *,
    processor: Any = None,
    max_quality_loss: float = 0.02,
    seed: int = 0,
    repeats: int | None = None,
    fresh: bool = False,
    progress: bool = True,
    command: str | None = None,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] | None = None,
    tasks: Sequence[str] | None = None,
    samples: int | None = None,
    question_later: bool | None = None,
) -> BenchResult:
    """Compare plans with the unmodified model on this model and this data; say which one to use.

    Args:
        model: a pack, hub id, folder, or a loaded model with its ``processor`` (tokenizer); None measures the small
            packs, a language model and a vision encoder.
        data: the user's own files (see :func:`load_data`); None measures on text that comes with Python.
        plans: plan texts, plan objects or YAML files; None compares the default set.
        suite: ``quick`` (minutes on two CPU cores) or ``full``; ``needle``, a grid of depths and lengths of one needle
            in a haystack; ``ruler``, tasks like RULER's.
        out: folder for results.jsonl, plan.yaml and report.html; a run that was interrupted goes on there.
        max_quality_loss: how much quality the recommended plan may lose, see :class:`PlanResult`.
        repeats: timed repeats; the suite's own number when None.
        fresh: forget results that are already in ``out``.
        lengths, depths, tasks, samples, question_later: what ``needle`` and ``ruler`` ask, see :class:`NeedleSuite` and
            :class:`RulerSuite`; their defaults when None.

    Raises:
        ThriftError: anything in the request that cannot be measured, before the first minute of compute where possible.
    """
    options = {"lengths": lengths, "depths": depths, "tasks": tasks, "samples": samples}
    size = find_suite(suite, repeats, {**options, "question_later": question_later})
    if not 0 <= max_quality_loss <= 1:
        raise ThriftError(f"max quality loss {max_quality_loss} is outside 0 to 1; 0.02 allows 2 points of 100")
    out = Path(out)
    store = Store(out, fresh)
    chosen = None if plans is None else plan_sets.read_plans(_listed(plans))
    found = size.usable(default_data() if data is None else load_data(_listed(data)))

    jobs = []
    for name in [model] if model is not None else _default_models(chosen, found):
        loaded = load_model(name, processor)
        mine = chosen if chosen is not None else [Plan.parse(p) for p in plan_sets.DEFAULTS[loaded.kind]]
        if model is None:
            mine = [p for p in mine if plan_sets.kind_of(p) == loaded.kind]
        for plan in mine:  # unknown stages fail here, before any compute
            apply(plan, loaded.model)
        jobs.append(JOBS[loaded.kind](loaded, mine, found, size, seed))
    store.begin(
        {
            "seed": seed,
            "suite": asdict(replace(size, repeats=0)),  # more repeats only add rows
            "plans": [str(p) for job in jobs for p in job.plans],
            "model": [job.loaded.identity for job in jobs],
            "data": digest(part for job in jobs for part in job.data_parts()),
            "machine": machine(),
        }
    )
    with show_progress(progress) as tick:
        for job in jobs:
            job.run(store, tick)
    result = BenchResult(
        out=out,
        sections=[job.section(store, max_quality_loss) for job in jobs],
        suite=size.name,
        seed=seed,
        max_quality_loss=max_quality_loss,
        source=found.source,
        machine=machine(),
        command=command or _command(model, data, plans, size, out, max_quality_loss, seed, repeats),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        rows=list(store.rows.values()),
        note=size.note,
    )
    from .report import write_plans, write_report, write_scores

    write_plans(result)
    write_scores(result)
    write_report(result)
    return result


class Job:
    """One model with its plans: knows what to measure, in which order, under which keys."""

    kind = ""

    def __init__(self, loaded: Loaded, plans: list[Plan], data: Data, suite: AnySuite, seed: int) -> None:
        self.loaded, self.label, self.model = loaded, loaded.label, loaded.model
        self.plans, self.suite, self.seed = plans, suite, seed
        self.everything = [Plan(), *plans]
        self.prepare(loaded.processor, data)

    def prepare(self, processor: Any, data: Data) -> None:
        raise NotImplementedError

    def data_parts(self) -> Iterator[str]:
        """What the data is told by: results of other data are none of this run."""
        raise NotImplementedError

    def section(self, store: Store, max_loss: float) -> Section:
        """The results so far."""
        raise NotImplementedError

    def steps(self) -> Iterator[tuple[str, Plan, Callable[[], dict[str, Any]], dict[str, Any]]]:
        """``(key, plan, measure, facts)`` in the order of measurement."""
        raise NotImplementedError

    def run(self, store: Store, tick: Callable[[str, int, int], None]) -> None:
        """Measure what the store does not have yet. A plan that fails is noted and left out; the others go on."""
        steps = list(self.steps())
        failed = {row["plan"] for row in store.rows.values() if "error" in row and row["section"] == self.kind}
        if any(key not in store for key, *_ in steps):
            self.warm_up()
        for done, (key, plan, measure, facts) in enumerate(steps):
            tick(f"{self.label}: {plan or 'unmodified'}", done, len(steps))
            if key in store or str(plan) in failed:
                continue
            row = {"key": key, "section": self.kind, "plan": str(plan), **facts}
            try:
                row |= measure()
            except _FAILURES as error:
                if not plan:  # without the unmodified model there is nothing to compare with
                    raise ThriftError(f"{self.label} failed without any plan: {_line(error)}") from error
                failed.add(str(plan))
                row["error"] = _line(error)
            store.add(row)
        tick(self.label, len(steps), len(steps))

    def warm_up(self) -> None:
        raise NotImplementedError


class LanguageJob(Job):
    """A causal language model: quality once a case, speed in interleaved repeats."""

    kind = "language"

    def prepare(self, processor: Any, data: Data) -> None:
        if not callable(getattr(processor, "apply_chat_template", None)) or not callable(processor):
            raise ThriftError(f"{self.label} is a language model: pass its tokenizer as processor=")
        if data.images and not (data.documents or data.prompts):
            raise ThriftError(f"{self.label} reads text, not images: give text, Markdown or JSONL files")
        self.cases = self.suite.cases(data, processor, self.seed, context_length(self.model))
        self.runner = LanguageBench(self.model, processor)
        # The decode stage changes no distribution: plans that differ in it only share their quality rows.
        quality: dict[Plan, Plan] = {}  # equal plans may be written differently: rows bear the name of the first
        self.measured = {plan: quality.setdefault(p := without_decode(plan), p) for plan in self.everything}

    def data_parts(self) -> Iterator[str]:
        return (str(case) for case in self.cases)

    def warm_up(self) -> None:
        case = Case("warm-up", "generation", "Warm up the kernels and load what a plan needs. " * 8, new_tokens=4)
        for plan in self.everything:
            with suppress(*_FAILURES):  # a plan that fails is noted when it is measured
                self.runner.speed(plan, case)

    def steps(self) -> Iterator[Any]:
        timed = [c for c in self.cases if c.kind == "generation"]
        for case in self.cases:
            if case.kind != "generation":
                for plan in dict.fromkeys(self.measured.values()):
                    facts: dict[str, Any] = {"kind": "quality", "case": case.id}
                    key = f"language|quality|{plan}|{case.id}"
                    yield key, plan, lambda p=plan, c=case: self.runner.quality(p, c), facts
        for repeat in range(self.suite.repeats):
            for number, case in enumerate(timed):
                turn = (repeat * len(timed) + number) % len(self.everything)
                for plan in self.everything[turn:] + self.everything[:turn]:  # no plan is always first
                    facts = {"kind": "speed", "case": case.id, "repeat": repeat}
                    key = f"language|speed|{plan}|{case.id}|{repeat}"
                    yield key, plan, lambda p=plan, c=case, r=repeat: self.runner.speed(p, c, check=r == 0), facts

    def section(self, store: Store, max_loss: float) -> Section:
        rows = [r for r in store.rows.values() if r["section"] == "language"]
        timed = [r for r in rows if "generated" in r]
        plain = {(r["case"], r["repeat"]): r for r in timed if not r["plan"]}
        for row in timed:
            if (row["case"], row["repeat"]) in plain:
                twin = plain[row["case"], row["repeat"]]
                row["same_output"] = common_prefix(row["generated"], twin["generated"])
        pairs = [(str(plan), str(self.measured[plan])) for plan in self.everything]
        results = summarise_language(rows, pairs, self.seed, max_loss)
        found = grids(rows, self.cases, pairs)
        return Section("language", self.label, results, cases=self.cases, runner=self.runner, grids=found)


class VisionJob(Job):
    """A vision encoder: features and time of every image, in interleaved repeats."""

    kind = "vision"

    def prepare(self, processor: Any, data: Data) -> None:
        if not isinstance(self.suite, Suite):
            raise ThriftError(
                f"the suite '{self.suite.name}' asks about texts, {self.label} reads images: use --suite quick"
            )
        if processor is None:
            raise ThriftError(f"{self.label} is a vision model: pass its image processor as processor=")
        if not data.images:
            raise ThriftError(f"{self.label} reads images: give --data files that end in .jpg, .png or .webp")
        self.images = list(data.images)
        self.runner = VisionBench(self.model, processor)

    def data_parts(self) -> Iterator[str]:
        return (hashlib.sha256(path.read_bytes()).hexdigest() for path in self.images)

    def warm_up(self) -> None:
        self.runner.measure(Plan(), self.images[0])

    def steps(self) -> Iterator[Any]:
        for repeat in range(self.suite.repeats):
            for number, (path, name) in enumerate(names(self.images).items()):
                turn = (repeat * len(self.images) + number) % len(self.everything)
                for plan in self.everything[turn:] + self.everything[:turn]:
                    facts = {"kind": "vision", "case": name, "repeat": repeat}
                    key = f"vision|{plan}|{name}|{repeat}"
                    yield key, plan, lambda p=plan, f=path: self.runner.measure(p, f), facts

    def section(self, store: Store, max_loss: float) -> Section:
        rows = [r for r in store.rows.values() if r["section"] == "vision"]
        results = summarise_vision(rows, [str(p) for p in self.everything], self.seed, max_loss)
        return Section("vision", self.label, results, images=self.images, runner=self.runner)


class VisualJob(Job):
    """A vision-language model: questions about scenes, each image once a plan."""

    kind = "visual"

    def prepare(self, processor: Any, data: Data) -> None:
        if not isinstance(self.suite, Suite):
            raise ThriftError(f"the suite '{self.suite.name}' asks about texts, {self.label} sees: use --suite quick")
        if not isinstance(processor, VisualProcessor) or not data.scenes:
            raise ThriftError(
                f"{self.label} cannot be measured on data of one's own yet: take --model {MODELS['visual']} without "
                "--data, or write a loop around tokenthrift.apply"
            )
        self.runner = VisualBench(self.model, processor)
        asked = questions(self.seed, QUESTIONS_A_SCENE * self.suite.scenes)
        self.asked = {f"scene/{i}": one for i, one in enumerate(asked[: self.suite.scenes])}

    def data_parts(self) -> Iterator[str]:
        for name, one in self.asked.items():
            yield f"{name} {one.questions} {hashlib.sha256(one.image.tobytes()).hexdigest()}"

    def warm_up(self) -> None:
        self.runner.measure(Plan(), self.asked["scene/0"])

    def steps(self) -> Iterator[Any]:
        for number, (name, one) in enumerate(self.asked.items()):
            turn = number % len(self.everything)
            for plan in self.everything[turn:] + self.everything[:turn]:
                facts = {"kind": "quality", "case": name}
                yield f"visual|{plan}|{name}", plan, lambda p=plan, o=one: self.runner.measure(p, o), facts

    def section(self, store: Store, max_loss: float) -> Section:
        rows = [r for r in store.rows.values() if r["section"] == "visual"]
        results = summarise_language(rows, [(str(p), str(p)) for p in self.everything], self.seed, max_loss)
        return Section("visual", self.label, results, asked=list(self.asked.values()), runner=self.runner)


JOBS: dict[str, type[Job]] = {job.kind: job for job in (LanguageJob, VisionJob, VisualJob)}


# ---- helpers --------------------------------------------------------------------------------------------------------


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _default_models(plans: list[Plan] | None, data: Data) -> list[str]:
    """The small packs that the plans and the data concern."""
    there = {
        "language": bool(data.documents or data.prompts),
        "vision": bool(data.images),
        "visual": data.scenes,
    }
    kinds = set(there) if plans is None else {plan_sets.kind_of(plan) for plan in plans}
    if not any(there[kind] for kind in kinds):
        raise ThriftError(
            "these plans and this data do not fit together: images need vision plans, text needs others, and plans for "
            "vision-language models bring scenes of their own: leave --data out"
        )
    return [MODELS[kind] for kind in there if there[kind] and kind in kinds]


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def machine() -> dict[str, str]:
    """What the times were measured on."""
    info = {
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenthrift": __version__,
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _command(
    model: Any, data: Any, plans: Any, suite: AnySuite, out: Path, max_loss: float, seed: int, repeats: int | None
) -> str:
    """The command line that does the same as this call."""
    import shlex

    words = ["tokenthrift", "bench"]
    if model is not None:
        words += ["--model", model if isinstance(model, str) else type(model).__name__]
    for flag, values in (("--data", data), ("--plans", plans)):
        for value in [] if values is None else _listed(values):
            words += [flag, str(value)]
    words += ["--suite", suite.name, *suite.flags(), "--max-quality-loss", str(max_loss), "--seed", str(seed)]
    if repeats is not None:
        words += ["--repeats", str(repeats)]
    return shlex.join([*words, "--out", str(out)])
