"""`tokenthrift calibrate`: measure once, on your model and prompts, what methods need to know."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..core.errors import ThriftError, did_you_mean


class _Methods(TyperGroup):
    """Beside its commands, every method that can be calibrated is one: methods are only looked up where none fits."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or _command_of(cmd_name)


app = typer.Typer(no_args_is_help=True, cls=_Methods)
_LONGEST = 2000  # characters of a document that make a prompt


@app.callback()  # with one command alone, its name would be left out
def main() -> None:
    """Measure, on your model and prompts, what methods need to know.

    METHOD is vocabulary, or a method that is calibrated per model, such as razor_attention.
    """


def _command_of(name: str) -> Any:
    """The command that calibrates a method."""
    from ..core.method import methods

    known = {info.name: info for info in methods() if hasattr(info.cls, "calibrate")}
    if name not in known:
        every = [info.name for info in methods()]
        hint = "it needs no calibration" if name in every else did_you_mean(name, ["vocabulary", *known])
        raise ThriftError(f"cannot calibrate '{name}': {hint}")
    calibrate = known[name].cls.calibrate  # type: ignore[attr-defined]
    options = [p for p in inspect.signature(calibrate).parameters if p not in ("model", "progress", "ids")]
    single = typer.Typer()

    @single.command(name, help=f"Calibrate {name} for a model. Options for --set: {', '.join(options)}.")
    def of_method(
        model: Annotated[str, typer.Option(help="Model pack, folder or hub id.")] = "smollm2-135m",
        out: Annotated[Path, typer.Option(help="The file to write.")] = Path(f"{name}.json"),
        set_: Annotated[
            list[str] | None, typer.Option("--set", help="An option as NAME=VALUE; can be repeated.")
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
    ) -> None:
        values = dict(_option(name, text, options) for text in set_ or [])
        _check_folder(out)
        from ..models.packs import load
        from ..models.packs.quiet import spinner

        loaded, _ = load(model)
        _check_writes(loaded, model)
        with spinner(enabled=not as_json) as tell:
            made = calibrate(loaded, progress=lambda done, of: tell(f"{done} of {of}"), **values)
        made.save(out)
        if as_json:
            typer.echo(json.dumps({"file": str(out), "method": name, "model": made.model}))
            return
        typer.echo(f"{out}: {name} for {model}")

    return typer.main.get_command(single)


def _option(name: str, text: str, options: list[str]) -> tuple[str, Any]:
    """``block=512`` to a name and a number."""
    key, sign, value = text.partition("=")
    if not sign or key not in options:
        raise ThriftError(f"--set {text} is none of {name}'s options: write NAME=VALUE with {', '.join(options)}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise ThriftError(f"cannot read the value of --set {text}: write a number") from None


def _check_folder(out: Path) -> None:
    if not out.parent.is_dir():
        raise ThriftError(f"cannot write {out}: there is no folder {out.parent}")


def _check_writes(loaded: Any, model: str) -> None:
    if not getattr(loaded, "can_generate", lambda: False)():
        raise ThriftError(f"{model} does not generate text: choose a causal language model")


@app.command("vocabulary")
def vocabulary(
    data: Annotated[
        list[Path], typer.Option(help="JSONL file of your prompts, or text files to go on from; can be repeated.")
    ],
    model: Annotated[str, typer.Option(help="The target: model pack, folder or hub id.")] = "smollm2-135m",
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("token-counts.json"),
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write after each prompt at most.", min=1)] = 128,
    raw: Annotated[bool, typer.Option("--raw", help="Do not wrap prompts in the model's chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Count which tokens the model writes, for draft models with a trimmed vocabulary: draft_model(trim=FILE)."""
    from ..bench.data import load_data
    from ..decoding.vocab_trim import calibrate_vocabulary
    from ..models.packs import load
    from ..models.packs.quiet import spinner

    found = load_data(data)
    prompts = [prompt.text for prompt in found.prompts] + [doc.text[:_LONGEST] for doc in found.documents]
    if not prompts:
        raise ThriftError(
            'there is no prompt in --data: give text files, or JSONL with lines such as {"prompt": "..."}'
        )
    _check_folder(out)
    loaded, tokenizer = load(model)
    _check_writes(loaded, model)
    with spinner(enabled=not as_json) as tell:
        counts = calibrate_vocabulary(
            loaded,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            raw=raw,
            progress=lambda done, of: tell(f"{done} of {of} prompts"),
        )
    counts.save(out)
    written, seen = sum(counts.counts.values()), len(counts.counts)
    if as_json:
        typer.echo(json.dumps({"file": str(out), "tokens": written, "seen": seen, "vocabulary": counts.vocabulary}))
        return
    typer.echo(f"{out}: {seen:,} of {counts.vocabulary:,} tokens seen in {written:,} that {model} wrote")
