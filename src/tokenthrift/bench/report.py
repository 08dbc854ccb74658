"""What a run leaves behind: a table in the terminal, plan.yaml, and one report.html that needs no network."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ..core.plan import Plan
from . import needle, ruler
from .grids import Grid, markdown, overview
from .summary import PlanResult
from .tasks import TASKS
from .visual import KINDS

if TYPE_CHECKING:
    from rich.table import Table

    from .runner import BenchResult, Section

NONE = "–"
WEAK = 0.1
"""Mean scores of the unmodified model below this leave nothing to lose."""
UNSTEADY = 1.5
"""Repeats that differ by more than this factor are worth a warning."""


# ---- formatting -----------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3, unit: str = "") -> str:
    """A number for people; a dash for what was not measured."""
    if value is None or value != value:
        return NONE
    rounded = round(value, digits) + 0.0  # no "-0.00"
    return f"{rounded:.{digits}f}{unit}"


def percent(value: float | None, digits: int = 0) -> str:
    """A share as a percentage."""
    return NONE if value is None or value != value else f"{100 * value:.{digits}f}%"


def signed(value: float) -> str:
    """A difference, with its sign."""
    return "0.00" if abs(value) < 0.005 else f"{value:+.2f}"


def span(low: float, high: float, digits: int = 3) -> str:
    """An interval."""
    return NONE if low != low else f"{number(low, digits)} … {number(high, digits)}"


def size(value: float) -> str:
    """Bytes as MB."""
    return NONE if value != value else f"{value / 1e6:,.1f} MB"


# ---- terminal -------------------------------------------------------------------------------------------------------


def table(section: Section, narrow: bool = False) -> Table:
    """The section's results as a rich table; ``narrow`` leaves out what the report has anyway."""
    from rich.markup import escape
    from rich.table import Table

    writes, language = section.kind != "vision", section.kind == "language"
    shown = Table(title=f"{escape(section.model)}", title_justify="left", title_style="bold", padding=(0, 1))
    columns: dict[str, Callable[[PlanResult], str]] = {
        "loss": lambda r: number(r.loss),
        "95%": lambda r: f"{number(r.loss_low, 2)}…{number(r.loss_high, 2)}",
    }
    if language:
        columns |= {"KL": lambda r: number(r.kl), "top-1": lambda r: percent(r.agreement)}
    if writes:
        columns |= {
            "tokens": lambda r: f"{number(r.tokens_before, 0)}→{number(r.tokens, 0)}",
            "TTFT s": lambda r: number(r.ttft_s, 2),
            "ms/tok": lambda r: number(r.decode_ms, 0),
            **({"FLOPs": lambda r: number(r.flops_ratio, 2, "×")} if language else {}),
            "KV": lambda r: number(r.kv_ratio, 2, "×"),
            "time": lambda r: number(r.time_ratio, 2, "×"),
            "cost": lambda r: number(r.cost, 2, "×"),
        }
    else:
        columns |= {
            "CLS cos": lambda r: number(r.cls, 4),
            "patch cos": lambda r: number(r.patches, 4),
            "tokens": lambda r: f"{number(r.tokens_before, 0)}→{number(r.tokens, 0)}",
            "FLOPs": lambda r: number(r.flops_ratio, 2, "×"),
            "time": lambda r: number(r.time_ratio, 2, "×"),
        }
    if narrow:
        columns = {name: show for name, show in columns.items() if name in ("loss", "KV", "FLOPs", "time")}
    shown.add_column("", width=1)
    shown.add_column("plan", overflow="fold", min_width=24, ratio=1)
    for name in columns:
        shown.add_column(name, justify="right", no_wrap=True)
    for r in section.results:
        if r.error:
            shown.add_row("", f"{escape(r.name)}\n[red]failed: {escape(r.error)}[/red]")
            continue
        mark = "★" if r.recommended else "•" if r.pareto else ""
        style = "bold green" if r.recommended else "" if r.pareto else "dim"
        cells = [show(r) for show in columns.values()]
        shown.add_row(mark, escape(r.name), *cells, style=style)
    return shown


def overview_table(section: Section) -> Table | None:
    """Scores of suites of questions, by length or by task; None for other suites."""
    from rich.markup import escape
    from rich.table import Table

    if not section.grids:
        return None
    heads, lines = overview(section.grids)
    shown = Table(padding=(0, 1))
    shown.add_column("score", overflow="fold", min_width=24)
    for head in heads:
        shown.add_column(head.replace("_", "\n"), justify="right")
    for grid, values in lines:
        shown.add_row(escape(grid.name), *(number(value, 2) for value in values))
    return shown


def headline(section: Section, max_loss: float) -> str:
    """One sentence: what to use and what it brings, or that nothing qualified."""
    best = section.best
    if not best.plan:
        return (
            f"No plan is cheaper and loses at most {max_loss:g} in quality on {section.model}: "
            "use the unmodified model, or allow more with --max-quality-loss."
        )
    gains = [f"{number(best.time_ratio, 2)}× the time"]
    if section.kind != "vision":
        gains.append(f"{number(best.kv_ratio, 2)}× the KV cache")
    elif best.flops_ratio == best.flops_ratio:
        gains.append(f"{number(best.flops_ratio, 2)}× the FLOPs")
    return f"{best.plan}: {' and '.join(gains)} of {section.model}, at a quality loss of {number(max(best.loss, 0))}."


def caution(section: Section, max_loss: float) -> str:
    """What the measurements are too few, or too unsteady, to say."""
    best, warnings = section.best, []
    spread = max((r.spread for r in section.results if r.spread == r.spread), default=1.0)
    if spread > UNSTEADY:
        warnings.append(
            f"Repeats of one measurement took up to {number(spread, 1)}× as long as each other: other work on this "
            "machine disturbed the times. Measure again on an idle machine, or with more --repeats."
        )
    weak = [task for task, score in section.results[0].tasks.items() if section.grids and score.mean < WEAK]
    if weak:
        warnings.append(
            f"The unmodified model itself finds next to nothing here ({', '.join(weak)}), so no plan can lose much: "
            "take easier --tasks or shorter --lengths."
        )
    if best.plan and best.loss_high > max_loss:
        warnings.append(
            f"The 95% interval of this loss reaches {number(best.loss_high)}, above the {max_loss:g} allowed: "
            "measure more, with --suite full or more data, before relying on it."
        )
    return " ".join(warnings)


# ---- plan.yaml ------------------------------------------------------------------------------------------------------


def write_plans(result: BenchResult) -> None:
    """plan.yaml for the first model; plan-<kind>.yaml for a second one."""
    for i, section in enumerate(result.sections):
        name = "plan.yaml" if i == 0 else f"plan-{section.kind}.yaml"
        (result.out / name).write_text(plan_yaml(section, result, name), encoding="utf-8")


def plan_yaml(section: Section, result: BenchResult, name: str = "plan.yaml") -> str:
    """The recommended plan as YAML that ``tokenthrift.apply`` reads, its figures as comments."""
    best = section.best
    ratios = {"time": best.time_ratio, "KV bytes": best.kv_ratio, "FLOPs": best.flops_ratio}
    figures = [f"quality loss {number(best.loss)} (95%: {span(best.loss_low, best.loss_high)})"]
    comments = [
        headline(section, result.max_quality_loss),
        caution(section, result.max_quality_loss),
        ", ".join(figures + [f"{name} {number(ratio, 2)}x" for name, ratio in ratios.items() if ratio == ratio]),
        f"model: {section.model}; data: {result.source}",
        f"measured {result.date} on {result.machine['processor']}, {result.machine['threads']} threads, by:",
        f"  {result.command}",
        f'use: with tokenthrift.apply("{name}", model, processor=tokenizer) as session: ...',
    ]
    lines = [" ".join(c.split()) if not c.startswith("  ") else c.replace("\n", " ") for c in comments if c]
    return "\n".join(f"# {line}" for line in lines) + "\n" + Plan.parse(best.plan).to_yaml()


# ---- scores.md ------------------------------------------------------------------------------------------------------


def write_scores(result: BenchResult) -> None:
    """scores.md for suites of questions: an overview, then a table a plan."""
    text = "\n".join(markdown(s.grids, result.note) for s in result.sections if s.grids)
    if text:
        (result.out / "scores.md").write_text(text, encoding="utf-8")


# ---- report.html ----------------------------------------------------------------------------------------------------


def write_report(result: BenchResult) -> None:
    """report.html: figures, tables, examples and how to reproduce them, in one file."""
    (result.out / "report.html").write_text(render(result), encoding="utf-8")


def render(result: BenchResult) -> str:
    """The page. Everything is inside it; nothing is loaded from anywhere."""
    from jinja2 import Environment

    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"num": number, "pct": percent, "size": size, "signed": signed}
    template = files("tokenthrift.bench").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    sections = [_section(section, result) for section in result.sections]
    measured = {task for section in sections for task in section["tasks"]}
    meanings = TASKS if not any(s["grids"] for s in sections) else needle.MEANING | ruler.MEANING
    tasks = {name: meaning for name, meaning in (meanings | KINDS).items() if name in measured}
    return page.from_string(template).render(result=result, sections=sections, tasks=tasks, span=span)


def _section(section: Section, result: BenchResult) -> dict[str, Any]:
    results = [r for r in section.results if not r.error]
    plots = [(plot(results, "time_ratio"), "Quality loss against end-to-end time")]
    if section.kind != "vision":
        plots.append((plot(results, "kv_ratio"), "Quality loss against the size of the KV cache"))
    elif all(r.flops_ratio == r.flops_ratio for r in results):
        plots.append((plot(results, "flops_ratio"), "Quality loss against FLOPs"))
    return {
        "kind": section.kind,
        "model": section.model,
        "headline": headline(section, result.max_quality_loss),
        "caution": caution(section, result.max_quality_loss),
        "best": section.best,
        "results": list(enumerate(section.results)),
        "tasks": list(dict.fromkeys(t for r in section.results for t in r.tasks)),
        "plots": [(svg, caption) for svg, caption in plots if svg],
        "grids": [(heat_map(grid), grid.name) for grid in section.grids],
        "texts": _texts(section, result.rows),
        "pictures": _scenes(section) if section.kind == "visual" else _pictures(section),
        "methods": methods_of(section.results),
    }


def methods_of(results: Sequence[PlanResult]) -> list[Any]:
    """What is known of every method that took part."""
    steps = [step for r in results for step in Plan.parse(r.plan)]
    return list({step.name: step.info for step in steps}.values())


INK, ACCENT, FAINT = "#010203", "#040506", "#070809"
_COLOURS = {INK: "var(--ink)", ACCENT: "var(--accent)", FAINT: "var(--faint)"}
"""Stand-ins, which become the page's own colours, so that dark mode works."""


def plot(results: Sequence[PlanResult], cost: str) -> str:
    """Inline SVG: plans by their number, the front joined. Its colours are the page's, so dark mode works."""
    points = [(i, getattr(r, cost), max(r.loss, 0.0), r) for i, r in enumerate(results)]
    points = [p for p in points if p[1] == p[1] and p[2] == p[2]]
    if len(points) < 2:
        return ""
    with _drawing(cost):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.2, 4.0), layout="constrained")
        axes = figure.add_subplot()
        front = _front([(x, y) for _, x, y, _ in points])
        axes.step(*zip(*front, strict=True), where="post", color=ACCENT, linewidth=1.5, alpha=0.6, zorder=1)
        x_range = max(p[1] for p in points) - min(p[1] for p in points) or 1.0
        y_range = max(p[2] for p in points) - min(p[2] for p in points) or 1.0
        placed: list[tuple[float, float]] = []
        for i, x, y, r in points:
            color = ACCENT if (x, y) in front else FAINT
            axes.scatter(x, y, s=44, color=color, zorder=2, linewidths=0)
            if r.recommended:
                axes.scatter(x, y, s=190, facecolors="none", edgecolors=ACCENT, linewidths=1.6, zorder=2)
            # Numbers of plans that lie nearly on one spot stand beside each other.
            near = sum(abs(x - a) / x_range < 0.04 and abs(y - b) / y_range < 0.05 for a, b in placed)
            placed.append((x, y))
            weight = "bold" if color == ACCENT else "normal"
            offset = (7 + 17 * near, 6)
            axes.annotate(str(i), (x, y), offset, textcoords="offset points", color=INK, fontsize=11, fontweight=weight)
        labels = {"time_ratio": "end-to-end time", "kv_ratio": "KV cache bytes", "flops_ratio": "FLOPs"}
        axes.set_xlabel(f"{labels[cost]}, relative to the unmodified model", color=INK)
        axes.set_ylabel("quality loss", color=INK)
        axes.margins(0.12)
        top = max(p[2] for p in points) or 0.01
        axes.set_ylim(-0.08 * top, 1.15 * top)
        axes.set_yticks([t for t in axes.get_yticks() if 0 <= t <= 1.15 * top])
        axes.axvline(1, color=FAINT, linewidth=0.8, linestyle=":", zorder=0)
        axes.tick_params(colors=INK, length=0)
        axes.grid(color=FAINT, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        return _svg(figure)


def heat_map(grid: Grid) -> str:
    """Inline SVG: a cell a row and column, the fuller the better, with its score."""
    with _drawing(grid.name):
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        wide, high = len(grid.columns), len(grid.rows)
        figure = Figure(figsize=(1.5 + max(0.62 * wide, 2.6), 0.75 + 0.34 * high), layout="constrained")
        axes = figure.add_subplot()
        for y, row in enumerate(grid.scores):
            for x, score in enumerate(row):
                known = 0.0 if score is None else min(max(score, 0.0), 1.0)
                alpha = 0.04 + 0.5 * known  # pale enough to read the number, on light pages and dark ones
                axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=ACCENT, alpha=alpha, linewidth=0))
                axes.text(x, y, number(score, 2), ha="center", va="center", color=INK, fontsize=10)
        axes.set_xlim(-0.5, wide - 0.5)
        axes.set_ylim(high - 0.5, -0.5)
        axes.set_xticks(range(wide), [f"{int(c):,}" for c in grid.columns])
        axes.set_yticks(range(high), [r.replace("_", " ") for r in grid.rows])
        axes.set_xlabel("tokens in the prompt", color=INK)
        if grid.by_depth:
            axes.set_ylabel("depth", color=INK)
        axes.tick_params(colors=INK, length=0)
        axes.spines[:].set_visible(False)
        return _svg(figure)


def _drawing(salt: str) -> Any:
    import matplotlib

    return matplotlib.rc_context({"svg.fonttype": "none", "font.size": 11, "svg.hashsalt": salt})


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Names of XML namespaces look like addresses; a page with inline SVG does not need them.
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s+(xmlns(:\w+)?|width|height)="[^"]*"', "", head)  # the width is the page's
    svg = f"{head}>{rest}"
    svg = svg.replace("xlink:href", "href")
    for stand_in, variable in _COLOURS.items():
        svg = svg.replace(stand_in, variable)
    return svg.replace("'sans-serif'", "inherit")


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The front of a plot's own two axes, from left to right."""
    from .pareto import pareto_front

    return sorted({points[i] for i in pareto_front(points)})


def _texts(section: Section, rows: Sequence[dict[str, Any]], limit: int = 2400) -> list[dict[str, Any]]:
    """Prompts that text stages shortened: runs of kept and dropped characters, one example a plan."""
    contexts = {case.id: case.context for case in section.cases}
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if "kept" not in row or row["case"] not in contexts:
            continue
        steps = " ".join(str(s) for s in Plan.parse(row["plan"]) if s.stage == "text")
        text = contexts[row["case"]][:limit]
        if steps not in found:
            found[steps] = {
                "plan": steps,
                "case": row["case"],
                "runs": runs(text, row["kept"]),
                "cut": len(text) < len(contexts[row["case"]]),
                "before": row["tokens_before"],
                "after": row["tokens"],
            }
    # What cuts into the most pieces shows most.
    return sorted(found.values(), key=lambda example: -len(example["runs"]))


def runs(text: str, kept: Sequence[Sequence[int]]) -> list[tuple[bool, str]]:
    """The text as ``(kept, piece)`` in order."""
    pieces, done = [], 0
    for start, end in [*sorted(map(tuple, kept)), (len(text), len(text))]:
        start, end = min(start, len(text)), min(end, len(text))
        pieces += [(False, text[done:start]), (True, text[start:end])]
        done = max(done, end)
    return [(keep, piece) for keep, piece in pieces if piece]


def _pictures(section: Section, side: int = 336) -> list[list[dict[str, str]]]:
    """A row for each of the first images: the image, then what every method's strongest plan merged or dropped."""
    plans = [r for r in section.results if r.plan and not r.error]
    if section.kind != "vision" or not plans:
        return []
    from PIL import Image

    from ..vision.overlay import draw_groups

    strongest = {tuple(s.name for s in Plan.parse(r.plan)): r for r in plans}  # plans go from mild to strong
    chosen = list(strongest.values()) if len(strongest) > 1 else [plans[0], plans[-1]][-len(plans) :]
    rows = []
    for path in section.images[:3]:
        with Image.open(path) as image:
            picture = image.convert("RGB").resize((side, side))
        rows.append(shown := [{"src": _data_uri(picture), "caption": path.stem}])
        for result in chosen:
            map = section.runner.groups(Plan.parse(result.plan), path)
            if map is not None:
                prefix = section.runner.prefix
                cells = round((map.n_in - prefix) ** 0.5)
                drawn = draw_groups(picture, map, (cells, cells), prefix)
                caption = f"{result.plan}: {map.n_in} → {map.n_out} tokens"
                shown.append({"src": _data_uri(drawn), "caption": caption})
    return rows


def _scenes(section: Section, side: int = 336) -> list[list[dict[str, str]]]:
    """A row for each of the first scenes: the image with a question, then what plans left of it and what they said."""
    from PIL import Image

    from ..vision.overlay import draw_groups

    plans = [r for r in section.results if r.plan and not r.error]
    rows = []
    for i, asked in enumerate(section.asked[:3]):
        question = asked.questions[i % len(asked.questions)]
        picture = asked.image.resize((side, side), Image.Resampling.LANCZOS)
        rows.append(shown := [{"src": _data_uri(picture), "caption": f"{question.text} ({question.answer})"}])
        for result in plans:
            map, answer = section.runner.shown(Plan.parse(result.plan), asked, question)
            if map is not None:
                drawn = draw_groups(picture, map, section.runner.grid(asked), prefix=0)
                caption = f"{result.plan}: {map.n_in} → {map.n_out} tokens: {answer}"
                shown.append({"src": _data_uri(drawn), "caption": caption})
    return rows


def _data_uri(image: Any) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
