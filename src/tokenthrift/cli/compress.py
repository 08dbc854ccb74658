"""`tokenthrift compress`: shorten a text file, or what comes through a pipe."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ThriftError


def compress(
    file: Annotated[str, typer.Argument(help="A UTF-8 text file, or - for standard input.")] = "-",
    method: Annotated[
        str, typer.Option(help="Text method; `tokenthrift methods --stage text` lists them.")
    ] = "selective_context",
    rate: Annotated[float, typer.Option(help="Share of the tokens to keep, in (0, 1].")] = 0.5,
    question: Annotated[
        str | None, typer.Option(help="What will be asked about the text, for methods that look at it.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Model pack, folder or hub id whose tokenizer counts and whose probabilities score.")
    ] = "smollm2-135m",
    param: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A parameter of the method; can be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the text to this file instead of standard output.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page that shows what was dropped.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Shorten a prompt to a share of its tokens, with spans of the original only."""
    text = _read(file)
    params = dict(_key_and_value(p) for p in param or [])
    result = _compress(text, method, {"rate": rate, **params}, question, model)

    if out is not None:
        _write(out, result.text)
    if html is not None:
        _write(html, result.html(page=True))
    if as_json:
        typer.echo(json.dumps(result.to_dict(), ensure_ascii=False, indent=2))
        return
    if out is None:
        typer.echo(result.text, nl=not result.text.endswith("\n"))
    typer.echo(result.summary, err=True)


def _compress(text: str, method: str, params: dict[str, Any], question: str | None, model: str) -> Any:
    """Load the model, with a bar on standard error while it scores, and compress."""
    from rich.console import Console
    from rich.progress import Progress

    from .. import api
    from ..core.method import find

    find(method, "text").make(**params)  # mistakes are told before a model is loaded
    scorer = api.load_scorer(model)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("scoring", total=None, visible=False)
        scorer.progress = lambda done, total: bar.update(task, completed=done, total=total, visible=True)
        return api.compress(text, method, question=question, scorer=scorer, **params)


def _read(file: str) -> str:
    from ..text.files import decode_text, read_text

    return decode_text(sys.stdin.buffer.read(), "standard input") if file == "-" else read_text(file)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise ThriftError(f"cannot write {path}: {error.strerror}") from None


def _key_and_value(text: str) -> tuple[str, Any]:
    """``level=sentence`` to a name and a value: a number, True, False or None where it reads as one, else a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ThriftError(f"cannot read --param {text}: write --param key=value")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
