"""From rows to one result a plan: medians, paired differences with intervals, quality loss, cost, Pareto front."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from math import nan, sqrt
from statistics import median
from typing import Any

from .metrics import bootstrap
from .pareto import pareto_front, recommend

Rows = Iterable[dict[str, Any]]


@dataclass
class Score:
    """A task's mean score with its 95% interval, and the paired difference with the unmodified model."""

    mean: float
    low: float
    high: float
    cases: int
    probes: int
    change: float
    change_low: float
    change_high: float


@dataclass
class PlanResult:
    """Everything measured of one plan. ``plan`` is empty for the unmodified model. Ratios are to the unmodified model.

    ``loss`` is the quality loss that plans are ranked by: the mean drop over all tasks with a right answer (on a scale
    of 0 to 1), for vision 1 - the mean cosine of the output features; where nothing has a right answer, the share of
    next tokens that change. ``cost`` is the geometric mean of the ratios of end-to-end seconds and KV bytes (vision:
    the ratio of seconds). ``spread`` is the slowest repeat over the fastest of the same case, the worst of all cases.
    """

    plan: str
    loss: float = nan
    loss_low: float = nan
    loss_high: float = nan
    cost: float = nan
    seconds: float = nan
    time_ratio: float = nan
    kv_bytes: float = nan
    kv_ratio: float = nan
    flops_ratio: float = nan
    tokens_before: float = nan
    tokens: float = nan
    compress_s: float = nan
    spread: float = nan
    ttft_s: float = nan
    decode_ms: float = nan
    kl: float = nan
    agreement: float = nan
    nats: float = nan
    same_output: float = nan
    exact: float = nan
    cls: float = nan
    patches: float = nan
    tasks: dict[str, Score] = field(default_factory=dict)
    pareto: bool = False
    recommended: bool = False
    error: str = ""

    @property
    def name(self) -> str:
        return self.plan or "unmodified"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what was not measured is None."""
        data: dict[str, Any] = _plain({"name": self.name, **asdict(self)})
        return data


def summarise_language(rows: Rows, plans: Sequence[tuple[str, str]], seed: int, max_loss: float) -> list[PlanResult]:
    """Results of ``plans``: pairs of a plan and the plan whose quality rows stand for it (itself less decode).

    The first pair is the unmodified model, ``("", "")``.
    """
    quality: dict[str, dict[str, Any]] = defaultdict(dict)
    speed: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    errors: dict[str, str] = {}
    for row in rows:
        if "error" in row:
            errors[row["plan"]] = row["error"]
        elif row["kind"] == "quality":
            quality[row["plan"]][row["case"]] = row
        elif row["kind"] == "speed":
            speed[row["plan"]][row["case"]].append(row)
    results = []
    for plan, measured in plans:
        result = PlanResult(plan, error=errors.get(plan) or errors.get(measured, ""))
        results.append(result)
        if not result.error:
            _fill_quality(result, quality[measured], quality[""], seed)
            if speed[""]:
                _fill_speed(result, speed[plan], speed[""])
            else:  # suites of questions time the prompt and its answer, which is as long for all plans
                answered = [{c: [r] for c, r in quality[p].items() if "seconds" in r} for p in (measured, "")]
                _fill_speed(result, *answered)
            if "decode" in plan and result.exact == result.exact:
                result.loss = max(result.loss, 1 - result.exact)
            result.cost = sqrt(result.time_ratio * result.kv_ratio)
    _rank(results, [lambda r: r.time_ratio, lambda r: r.kv_ratio], max_loss)
    return results


def _fill_quality(result: PlanResult, rows: dict[str, Any], base: dict[str, Any], seed: int) -> None:
    shared = [case for case in base if case in rows]
    for name in ("kl", "agreement", "nats"):
        setattr(result, name, _mean([rows[c][name] for c in shared if name in rows[c]]))
    for name in ("tokens_before", "tokens", "kv_bytes"):
        setattr(result, name, _mean([rows[c][name] for c in shared]))
    result.kv_ratio = _ratio(sum(rows[c]["kv_bytes"] for c in shared), sum(base[c]["kv_bytes"] for c in shared))
    drops: dict[str, list[float]] = {}
    for task in dict.fromkeys(t for c in shared for t in _scores(base[c])):
        mine = {c: s for c in shared if (s := _scores(rows[c]).get(task))}
        theirs = {c: _scores(base[c])[task] for c in mine}
        means = [_mean(s) for s in mine.values()]
        drops[task] = [_mean(theirs[c]) - _mean(mine[c]) for c in mine]
        change, high, low = (-x for x in bootstrap({task: drops[task]}, seed))
        probes = sum(map(len, mine.values()))
        result.tasks[task] = Score(*bootstrap({task: means}, seed), len(means), probes, change, low, high)
    if not drops:
        drops = {"agreement": [1 - rows[c]["agreement"] for c in shared if "agreement" in rows[c]]}
    result.loss, result.loss_low, result.loss_high = bootstrap(drops, seed)


def _scores(row: dict[str, Any]) -> dict[str, list[float]]:
    """Scores of a case by task; a document's held-back continuation is a task too."""
    found: dict[str, list[float]] = defaultdict(list)
    if "continuation" in row:
        found["continuation"].append(row["continuation"])
    for task, score in row.get("scores", []):
        found[task].append(score)
    return found


def _fill_speed(result: PlanResult, rows: dict[str, list[Any]], base: dict[str, list[Any]]) -> None:
    shared = [case for case in base if case in rows]
    if not shared:
        return
    for name in ("compress_s", "ttft_s", "decode_ms"):
        setattr(result, name, _mean([median(r[name] for r in rows[c]) for c in shared]))
    result.spread = _spread([[r["seconds"] for r in rows[c]] for c in shared])
    seconds = {c: median(r["seconds"] for r in rows[c]) for c in shared}
    result.seconds = _mean(list(seconds.values()))
    result.time_ratio = _ratio(sum(seconds.values()), sum(median(r["seconds"] for r in base[c]) for c in shared))
    if all("flops" in r[c][0] for r in (rows, base) for c in shared):
        result.flops_ratio = _ratio(sum(rows[c][0]["flops"] for c in shared), sum(base[c][0]["flops"] for c in shared))
    result.same_output = _mean([r["same_output"] for c in shared for r in rows[c] if "same_output" in r])
    result.exact = _mean([r["exact"] for c in shared for r in rows[c] if "exact" in r])


def summarise_vision(rows: Rows, plans: Sequence[str], seed: int, max_loss: float) -> list[PlanResult]:
    """Results of the vision plans; the first is the unmodified model, ``""``."""
    found: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    errors: dict[str, str] = {}
    for row in rows:
        if "error" in row:
            errors[row["plan"]] = row["error"]
        elif row["kind"] == "vision":
            found[row["plan"]][row["case"]].append(row)
    results = []
    for plan in plans:
        result = PlanResult(plan, error=errors.get(plan, ""))
        results.append(result)
        mine, base = found[plan], found[""]
        shared = [c for c in base if c in mine]
        if result.error or not shared:
            continue
        first = [mine[c][0] for c in shared]
        for name in ("cls", "patches", "tokens_before", "tokens"):
            setattr(result, name, _mean([r[name] for r in first]))
        losses = [1 - (r["cls"] + r["patches"]) / 2 for r in first] if plan else [0.0]
        result.loss, result.loss_low, result.loss_high = bootstrap({"cosine": losses}, seed)
        result.spread = _spread([[r["seconds"] for r in mine[c]] for c in shared])
        seconds = {c: median(r["seconds"] for r in mine[c]) for c in shared}
        result.seconds = _mean(list(seconds.values()))
        result.cost = result.time_ratio = _ratio(
            sum(seconds.values()), sum(median(r["seconds"] for r in base[c]) for c in shared)
        )
        if not plan:
            result.flops_ratio = 1.0
        elif all("flops" in r for r in first):
            result.flops_ratio = _ratio(sum(r["flops"] for r in first), sum(r["flops_full"] for r in first))
    _rank(results, [lambda r: r.time_ratio], max_loss)
    return results


def _rank(results: list[PlanResult], costs: list[Any], max_loss: float) -> None:
    """Mark the front (quality loss against each cost) and the cheapest plan that loses at most ``max_loss``."""
    ranked = [r for r in results if not r.error and r.loss == r.loss and r.cost == r.cost]
    losses = [max(r.loss, 0.0) for r in ranked]  # to come out better than the unmodified model is luck, not merit
    for i in pareto_front([(loss, *(cost(r) for cost in costs)) for loss, r in zip(losses, ranked, strict=True)]):
        ranked[i].pareto = True
    chosen = recommend(losses, [r.cost for r in ranked], max_loss)
    # Nothing is recommended that costs more than doing nothing: the unmodified model is one of those compared.
    if ranked:
        ranked[chosen or 0].recommended = True


def _spread(repeats: Sequence[Sequence[float]]) -> float:
    return max(max(seconds) / min(seconds) for seconds in repeats)


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and value != value else value


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else nan


def _ratio(a: float, b: float) -> float:
    return a / b if b else nan
