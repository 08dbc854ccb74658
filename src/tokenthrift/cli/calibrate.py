"""`tokenthrift calibrate`: measure once, on your model and prompts, what methods need to know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import ThriftError

app = typer.Typer(no_args_is_help=True)
_LONGEST = 2000  # characters of a document that make a prompt


@app.callback()  # with one command alone, its name would be left out
def main() -> None:
    """Measure, on your model and prompts, what methods need to know."""


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
    if not out.parent.is_dir():
        raise ThriftError(f"cannot write {out}: there is no folder {out.parent}")
    loaded, tokenizer = load(model)
    if not getattr(loaded, "can_generate", lambda: False)():
        raise ThriftError(f"{model} does not generate text: choose a causal language model")
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
