"""`tokenthrift methods`: what there is, by stage."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def methods(
    stage: Annotated[str | None, typer.Option(help="Only one stage, e.g. cache.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """List the methods: stage, name, parameters, paper."""
    from ..core.method import methods as known

    found = known(stage)
    if as_json:
        typer.echo(json.dumps([m.to_dict() for m in found], indent=2, ensure_ascii=False, default=str))
        return

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("stage", "method", "what it does", "paper", "status")
    for m in found:
        parameters = ", ".join(name if v is ... else f"{name}={v!r}" for name, v in m.defaults.items())
        paper = m.paper + (f" (arXiv {m.arxiv})" if m.arxiv else "")
        table.add_row(m.stage, escape(f"{m.name}({parameters})"), escape(m.summary), escape(paper), m.status)
    Console().print(table)
