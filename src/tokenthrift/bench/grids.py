"""Tables of scores, one a plan: where in the prompt, or which task, by how long the prompt was."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .tasks import Case


@dataclass
class Grid:
    """Means of a plan, row by row: the share of expected strings that it wrote, and the probability of the answer.

    ``score`` is the one that plans are ranked by, ``recall`` or ``probability``. None: not measured.
    """

    plan: str
    score: str
    rows: list[str]
    columns: list[str]
    recall: list[list[float | None]]
    probability: list[list[float | None]]

    @property
    def name(self) -> str:
        return self.plan or "unmodified"

    @property
    def by_depth(self) -> bool:
        """True if the rows are depths, else they are tasks."""
        return self.rows[0].endswith("%")

    @property
    def scores(self) -> list[list[float | None]]:
        return self.recall if self.score == "recall" else self.probability


def grids(rows: Iterable[dict[str, Any]], cases: Sequence[Case], plans: Sequence[tuple[str, str]]) -> list[Grid]:
    """Grids of the cases that have a cell; ``plans`` are pairs of a plan and the plan whose rows stand for it."""
    asked = {case.id: case for case in cases if case.expected}
    if not asked:
        return []
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    failed = set()
    for row in rows:
        if "error" in row:
            failed.add(row["plan"])
        elif row["case"] in asked and "recall" in row:
            found[row["plan"], *asked[row["case"]].cell].append(row)
    down, across = (list(dict.fromkeys(case.cell[i] for case in asked.values())) for i in (0, 1))
    score = next(iter(asked.values())).score

    def table(plan: str, name: str) -> list[list[float | None]]:
        return [[mean([r[name] for r in found[plan, row, column]]) for column in across] for row in down]

    return [
        Grid(plan, score, down, across, table(measured, "recall"), table(measured, "probability"))
        for plan, measured in plans
        if not failed & {plan, measured}
    ]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of what was measured."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def overview(grids: Sequence[Grid]) -> tuple[list[str], list[tuple[Grid, list[float | None]]]]:
    """What tells plans apart at one glance: means over depths for each length, or over lengths for each task.

    By lengths where the rows are depths, else by tasks.
    """
    first = grids[0]
    if first.by_depth:
        return first.columns, [(g, [mean(column) for column in zip(*g.scores, strict=True)]) for g in grids]
    return first.rows, [(g, [mean(row) for row in g.scores]) for g in grids]


def markdown(grids: Sequence[Grid], note: str) -> str:
    """All grids as Markdown: an overview, then two tables a plan, that of its scores first."""
    heads, lines = overview(grids)
    corner = "depth" if grids[0].by_depth else "task"
    parts = [_table(["plan", *heads], [[f"`{g.name}`" if g.plan else g.name, *map(_cell, v)] for g, v in lines])]
    for grid in grids:
        parts.append(f"## {f'`{grid.name}`' if grid.plan else grid.name}")
        for name in (grid.score, *({"recall", "probability"} - {grid.score})):
            parts += [_MEANING[name], _table([corner, *grid.columns], _body(grid, getattr(grid, name)))]
    return "\n\n".join([note, *parts]) + "\n"


_MEANING = {
    "recall": "Share of the expected strings that it wrote:",
    "probability": "Probability that it gave to the answer, a token (geometric mean, by teacher forcing):",
}


def _body(grid: Grid, values: Sequence[Sequence[float | None]]) -> list[list[str]]:
    return [[name, *map(_cell, row)] for name, row in zip(grid.rows, values, strict=True)]


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
