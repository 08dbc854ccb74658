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
    ] = "word_head",
    rate: Annotated[
        float | None,
        typer.Option(help="Share of the tokens to keep, in (0, 1]; what the method does by default is 0.5."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="How many tokens to keep, instead of a rate.")] = None,
    spend: Annotated[
        float | None, typer.Option(help="What the text may cost, instead of a rate; needs --price.")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Of a million tokens, in the currency of --spend.")] = None,
    question: Annotated[
        str | None, typer.Option(help="What will be asked about the text, for methods that look at it.")
    ] = None,
    protect: Annotated[
        str,
        typer.Option(
            help="What must survive: default, structure, none, or kinds: code,json,url,... A minus takes one away; "
            "with 'whole' (default,whole) some of it goes, unbroken, where it alone exceeds the target."
        ),
    ] = "default",
    min_saving: Annotated[
        str, typer.Option(help="Leave the text alone if less is saved: tokens (100), or a share (0.1).")
    ] = "0",
    max_loss: Annotated[
        float | None, typer.Option(help="Leave the text alone if the predicted loss is larger, in [0, 1].")
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Score so many tokens of a long text at a time.")] = None,
    messages: Annotated[
        bool,
        typer.Option("--messages", help="The file is a JSON list of chat messages, or an object with such a list."),
    ] = False,
    roles: Annotated[str | None, typer.Option(help="With --messages: whose are shortened, e.g. user,tool.")] = None,
    append_only: Annotated[
        bool, typer.Option("--append-only", help="With --messages: later turns never change what earlier ones became.")
    ] = False,
    model: Annotated[
        str, typer.Option(help="Model pack, folder or hub id whose tokenizer counts and whose probabilities score.")
    ] = "smollm2-135m",
    tokenizer: Annotated[
        str | None, typer.Option(help="What counts, if not the model's own: pack, folder, hub id, or tiktoken:gpt-4o.")
    ] = None,
    param: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A parameter of the method; can be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the text to this file instead of standard output.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page that shows what was dropped and protected.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
    pattern: Annotated[
        str | None,
        typer.Option("--input", help="A corpus instead of a file: a glob of .parquet and .jsonl files, in quotes."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="With --input: the folder for what comes of it; a run goes on where it was left."),
    ] = None,
    column: Annotated[str, typer.Option(help="With --input: the column of the texts.")] = "text",
    engine: Annotated[str, typer.Option(help="With --input: local, or ray.")] = "local",
    workers: Annotated[int | None, typer.Option(help="With --engine ray: how many; one a CPU by default.")] = None,
    part_rows: Annotated[int, typer.Option(help="With --input: rows in a part, which is done as a whole.")] = 1000,
) -> None:
    """Shorten a prompt to a share of its tokens, with spans of the original only; or every text of a corpus."""
    if not messages and (roles is not None or append_only):
        raise ThriftError("--roles and --append-only are for chat messages: add --messages")
    if messages and html is not None:
        raise ThriftError("--html shows one text: leave it out with --messages")
    options = {
        "question": question,
        "tokens": tokens,
        "spend": spend,
        "price": price,
        "protect": protect,
        "min_saving": _number(min_saving),
        "max_loss": max_loss,
        "chunk": chunk,
        "tokenizer": tokenizer,
        **({"roles": roles, "append_only": append_only} if messages else {}),
    }
    params = {**({} if rate is None else {"rate": rate}), **dict(_key_and_value(p) for p in param or [])}
    if pattern is not None:
        if file != "-" or messages or html is not None or out is not None:
            raise ThriftError("--input reads a corpus: leave out FILE, --messages, --html and --out (it has --output)")
        from ..integrations.corpus.job import Settings
        from .corpus import compress_corpus

        settings = Settings(column, method, params, options, model)
        compress_corpus(pattern, output, settings, engine=engine, workers=workers, rows=part_rows, as_json=as_json)
        return
    if output is not None or engine != "local":
        raise ThriftError("--output and --engine are for a corpus: name its files with --input")
    text = _read(file)
    data, chat = _messages(text) if messages else (None, None)
    result = _compress(chat if messages else text, method, params, options, model)

    shown = json.dumps(_put_back(data, result.messages), ensure_ascii=False, indent=2) if messages else result.text
    if out is not None:
        _write(out, shown)
    if html is not None:
        _write(html, result.html(page=True))
    if as_json:
        typer.echo(json.dumps(result.to_dict(), ensure_ascii=False, indent=2))
        return
    if out is None:
        typer.echo(shown, nl=not shown.endswith("\n"))
    typer.echo(result.summary, err=True)
    for note in result.notes:
        typer.echo(f"note: {note}", err=True)


def _compress(text: Any, method: str, params: dict[str, Any], options: dict[str, Any], model: str) -> Any:
    """Load the model, with a bar on standard error while it scores, and compress."""
    from rich.console import Console
    from rich.progress import Progress

    from .. import api
    from ..core.method import find
    from ..text.protect import Protection

    api.target_of(params.get("rate"), *(options[name] for name in ("tokens", "price", "spend")))
    Protection.of(options["protect"])
    made = find(method, "text").make(**params)  # mistakes are told before a model is loaded
    scorer = api.load_scorer(model) if options["tokenizer"] is None or "scorer" in made.info.needs else None
    run = api.compress if isinstance(text, str) else api.compress_messages
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("scoring", total=None, visible=False)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        if scorer is not None and options["chunk"] is None:
            scorer.progress = show
        elif options["chunk"] is not None:
            options = {**options, "progress": show}
        return run(text, method, scorer=scorer, **options, **params)


def _messages(text: str) -> tuple[Any, Any]:
    """What the JSON holds, and the messages in it: the document itself, or what it calls ``messages``."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ThriftError(f"--messages needs JSON: {error}") from None
    chat = data.get("messages") if isinstance(data, dict) else data
    if not isinstance(chat, list):
        raise ThriftError("--messages needs a JSON list of messages, or an object with one called 'messages'")
    return data, chat


def _put_back(data: Any, messages: list[Any]) -> Any:
    return {**data, "messages": messages} if isinstance(data, dict) else messages


def _number(text: str) -> int | float:
    """An int is a number of tokens, a float a share."""
    try:
        return int(text) if text.strip().lstrip("+-").isdecimal() else float(text)
    except ValueError:
        raise ThriftError(
            f"--min-saving {text} is no number: give tokens, such as 100, or a share, such as 0.1"
        ) from None


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
