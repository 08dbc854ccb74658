"""`tokenthrift compress --input`: every text of a corpus, resumable, here or on Ray."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..core.errors import ThriftError

if TYPE_CHECKING:
    from ..integrations.corpus.job import Done, Settings


def compress_corpus(
    pattern: str,
    output: Path | None,
    settings: Settings,
    *,
    engine: str = "local",
    workers: int | None = None,
    rows: int = 1000,
    as_json: bool = False,
) -> None:
    """Shorten the texts of all files that fit the pattern into Parquet files in a folder; go on where a run was left.

    Raises:
        ThriftError: mistakes in the settings, before a text is read; inputs or an output that do not fit.
    """
    from ..integrations.corpus import engines, folder
    from ..integrations.corpus.inputs import find
    from ..integrations.corpus.job import Shortener

    if output is None:
        raise ThriftError("--input needs --output: the folder that gets the shortened texts")
    if output.exists() and not output.is_dir():
        raise ThriftError(f"--output {output} is a file: give a folder")
    output = output.resolve()
    _check(settings)
    shorten = engines.engine(engine, workers)
    corpus = find(pattern, settings.column, rows)
    start = time.perf_counter()
    with folder.locked(output):
        done = folder.opened(output, corpus, settings, rows)
        before = len(done)
        left = folder.pending(corpus, done)
        _follow(shorten(Shortener(settings, corpus.kinds, output), left), done, corpus)
    told = _told(done, len(done) - before, output, time.perf_counter() - start)
    typer.echo(json.dumps(told, ensure_ascii=False, indent=2) if as_json else _sentence(told), err=not as_json)


def _check(settings: Settings) -> None:
    """Tell what would fail for every text."""
    from .. import api
    from ..core.method import find
    from ..text.protect import Protection
    from ..text.runtime import compress_text

    options = settings.options
    target = api.target_of(settings.params.get("rate"), *(options.get(name) for name in ("tokens", "price", "spend")))
    made = find(settings.method, "text").make(**({**settings.params, **({} if target is None else {"rate": target})}))
    if "question" in made.info.needs and not (options.get("question") or "").strip():
        raise ThriftError(f"{settings.method} keeps what a question needs: give one with --question")
    limits = {name: options[name] for name in ("min_saving", "max_loss", "chunk") if name in options}
    compress_text([], "", None, None, protect=Protection.of(options.get("protect", "default")), **limits)


def _follow(results: Any, done: list[Done], corpus: Any) -> None:
    """Add to ``done`` as results come, with a bar on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=sum(part.rows for part in corpus.parts), completed=sum(d.rows for d in done))
        for result in results:
            done.append(result)
            bar.advance(task, result.rows)


def _told(done: list[Done], parts: int, output: Path, seconds: float) -> dict[str, Any]:
    ordered = sorted(done, key=lambda d: d.index)
    sums = {name: sum(getattr(d, name) for d in done) for name in ("rows", "failed", "tokens_before", "tokens_after")}
    first = next((d.first_error for d in ordered if d.first_error), None)
    more = {"first_error": first, "parts": len(done), "parts_now": parts, "output": str(output), "seconds": seconds}
    return {**sums, **more}


def _sentence(told: dict[str, Any]) -> str:
    kept = told["tokens_after"] / told["tokens_before"] if told["tokens_before"] else 1.0
    lines = [
        f"{told['rows']:,} rows, {told['tokens_before']:,} -> {told['tokens_after']:,} tokens ({kept:.1%} kept), "
        f"{told['parts']} parts in {told['output']}"
    ]
    if told["parts_now"] < told["parts"]:
        lines.append(f"{told['parts'] - told['parts_now']} of the parts were done before")
    if told["failed"]:
        lines.append(
            f"{told['failed']:,} rows failed and say why in their column 'error'; first: {told['first_error']}"
        )
    return "\n".join(lines)
