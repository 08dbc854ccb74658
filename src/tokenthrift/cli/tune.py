"""`tokenthrift tune`: the same cost, better spread over the layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..bench.tuning import TuneResult


def tune(
    plan: Annotated[
        str,
        typer.Argument(help="A plan such as 'vision=tome(keep=0.5)', or a plan.yaml: the search keeps to its cost."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Model pack, folder or hub id; by default dinov2-s or smollm2-135m, whichever fits the plan.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder or file of your images or texts, without labels; can be repeated. A quarter is held out. "
            "By default what comes with Tokenthrift and Python, which is little.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, plan.yaml and report.json.")] = Path(
        "tokenthrift-tune"
    ),
    size: Annotated[
        int | None,
        typer.Option(
            help="Pixels a side to which images are scaled; by default what the model is made for.",
            show_default=False,
            min=1,
        ),
    ] = None,
    search: Annotated[
        str,
        typer.Option(
            help="evolution, for every method with budgets layer by layer; gradient, for diffrate (rates) and pyra "
            "(weights)."
        ),
    ] = "evolution",
    generations: Annotated[int, typer.Option(help="Generations of the evolution.", min=1)] = 40,
    offspring: Annotated[int, typer.Option(help="Offspring of each generation.", min=1)] = 16,
    steps: Annotated[int, typer.Option(help="Steps of the gradient search.", min=1)] = 300,
    inputs: Annotated[int, typer.Option(help="How many images or texts to use at most.", min=2)] = 64,
    step: Annotated[
        int | None,
        typer.Option(
            help="By how many tokens (or percent) one change moves a budget; by default an eighth of the mean budget.",
            show_default=False,
            min=1,
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="How much cheaper than the plan a schedule may be; it is never dearer.")
    ] = 0.02,
    seed: Annotated[int, typer.Option(help="Seed of the search, of the held-out inputs and of the bootstrap.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; forget results in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> None:
    """Spread a plan's budget over the layers so that your model's outputs move less, at the same cost.

    Ctrl-C ends the search and keeps the best so far; the same command again goes on from there.
    """
    from ..bench.tuning import tune as run_tune

    try:
        result = run_tune(
            plan,
            model,
            data,
            out,
            size=size,
            search=search,
            generations=generations,
            offspring=offspring,
            steps=steps,
            inputs=inputs,
            step=step,
            tolerance=tolerance,
            seed=seed,
            fresh=fresh,
        )
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted; give the same command again to go on with what is in {out}", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2, ensure_ascii=False))
    else:
        _print(result)
    if result.interrupted:
        typer.echo(f"interrupted after {result.done}; give the same command again to go on", err=True)
        raise typer.Exit(130)


def _print(result: TuneResult) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=132)  # a file or a pipe has no width
    table = Table()
    for column in ("", "loss", f"{result.unit} left"):
        table.add_column(column, justify="right" if column else "left")
    for name, loss, cost in (
        ("start", result.start_loss, result.start_cost),
        ("tuned", result.tuned_loss, result.tuned_cost),
    ):
        table.add_row(name, f"{loss:.4g}", f"{cost / result.dense_cost:.1%}")
    console.print(table)
    console.print(f"loss: {result.loss}; means over {result.held_out} held-out inputs", style="dim", markup=False)
    schedules: dict[str, Any] = result.schedules
    for name, value in schedules.items():
        if name != "parameter":
            label = f"{schedules['parameter']}, {name}" if "parameter" in schedules else name
            console.print(f"{label}: {value}", markup=False)
    console.print(result.headline, style="bold", markup=False)
    if result.caution:
        console.print(result.caution, style="yellow", markup=False)
    console.print(f"plan {result.out / 'plan.yaml'}   report {result.out / 'report.json'}", markup=False)
