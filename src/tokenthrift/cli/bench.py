"""`tokenthrift bench`: which reduction makes this model cheaper on this data without hurting it?"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def bench(
    model: Annotated[
        str | None,
        typer.Option(
            help="Model pack, folder or hub id; by default the packs smollm2-135m and dinov2-s.", show_default=False
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help='Your text, Markdown, JSONL ({"prompt": ..., "answer": ...}) or image file; can be repeated. '
            "By default text that comes with Python, and sample photographs.",
            show_default=False,
        ),
    ] = None,
    plans: Annotated[
        list[str] | None,
        typer.Option(
            help="A plan such as 'cache=snapkv(budget=512)', or a YAML file with a list of plans; can be repeated. "
            "By default a set that covers all stages.",
            show_default=False,
        ),
    ] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="quick (minutes on two CPU cores) or full; needle (a grid of depths and lengths of one needle in a "
            "haystack) or ruler (tasks like RULER's)."
        ),
    ] = "quick",
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, plan.yaml and report.html.")] = Path(
        "tokenthrift-bench"
    ),
    max_quality_loss: Annotated[
        float, typer.Option(help="How much quality the recommended plan may lose, 0 to 1.")
    ] = 0.02,
    seed: Annotated[int, typer.Option(help="Seed of the choice of prompts and of the bootstrap.")] = 0,
    repeats: Annotated[
        int | None, typer.Option(help="Timed repeats; by default the suite's.", show_default=False)
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="needle, ruler: tokens in the prompts, such as 1024,2048.", show_default=False),
    ] = None,
    depths: Annotated[
        str | None,
        typer.Option(help="needle: where it lies, in percent of the text, such as 0,50,100.", show_default=False),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="ruler: tasks, such as single_needle,key_value.", show_default=False)
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="needle, ruler: cases in every cell of the tables.", show_default=False)
    ] = None,
    question_later: Annotated[
        bool | None,
        typer.Option(
            "--question-later",
            help="needle, ruler: ask when the prompt has been reduced already, as when a cache serves many questions.",
            show_default=False,
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; forget results in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> None:
    """Compare reductions with the unmodified model on your model and data; recommend one.

    A run that is interrupted goes on where it stopped when the same command is given again.
    """
    from ..bench.report import caution, headline, overview_table, table
    from ..bench.runner import bench as run_bench

    try:
        result = run_bench(
            model,
            data,
            plans,
            suite,
            out,
            max_quality_loss=max_quality_loss,
            seed=seed,
            repeats=repeats,
            fresh=fresh,
            lengths=None if lengths is None else _numbers("--lengths", lengths),
            depths=None if depths is None else _numbers("--depths", depths),
            tasks=None if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()],
            samples=samples,
            question_later=question_later,
            command=shlex.join(["tokenthrift", *sys.argv[1:]]) if sys.argv[1:2] == ["bench"] else None,
        )
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted; what was measured is in {out}: give the same command again to go on", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2, ensure_ascii=False))
        return

    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=132)  # a file or a pipe has no width
    for section in result.sections:
        console.print(table(section, narrow=console.width < 120))
        if scores := overview_table(section):
            console.print(scores)
        console.print("★ recommended  • on the Pareto front", style="dim")
        console.print(headline(section, max_quality_loss), style="bold", markup=False)
        if warning := caution(section, max_quality_loss):
            console.print(warning, style="yellow", markup=False)
        console.print()
    console.print(f"report {result.out / 'report.html'}   plan {result.out / 'plan.yaml'}", markup=False)


def _numbers(option: str, text: str) -> list[Any]:
    """Numbers with commas between them; whole ones stay whole."""
    from ..core.errors import ThriftError

    try:
        found = [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise ThriftError(f"{option} takes numbers with commas between them, not '{text}'") from None
    return [int(n) if n.is_integer() else n for n in found]
