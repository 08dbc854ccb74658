"""`tokenthrift methods`: what there is, by stage."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def methods(
    stage: Annotated[str | None, typer.Option(help="Only one stage, e.g. cache.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """List the methods: stage, name, what they do, parameters, paper."""
    from ..core.method import methods as known

    found = known(stage)
    if as_json:
        typer.echo(json.dumps([m.to_dict() for m in found], indent=2, ensure_ascii=False, default=str))
        return

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(
        "stage", Column("method", no_wrap=True), "what it does", "parameters", Column("arXiv", no_wrap=True), "status"
    )
    for m in found:
        parameters = " ".join(name if v is ... else f"{name}={v!r}" for name, v in m.defaults.items())
        table.add_row(m.stage, m.name, escape(m.summary), escape(parameters), m.arxiv or "", m.status)
    Console().print(table)
