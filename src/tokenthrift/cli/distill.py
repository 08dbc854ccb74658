"""`tokenthrift distill`: make a token classifier for llmlingua2, from texts of your own and a large model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ThriftError

app = typer.Typer(no_args_is_help=True)
_JSON = typer.Option("--json", help="Print one JSON document instead of text.")


@app.callback()
def main() -> None:
    """Make a token classifier for llmlingua2: teach, then label, then train."""


@app.command("teach")
def teach(
    data: Annotated[list[Path], typer.Option(help="A UTF-8 text file; can be repeated.")],
    teacher: Annotated[str, typer.Option(help="The model's name at the endpoint.")],
    out: Annotated[Path, typer.Option(help="JSONL to append to; texts in it are not asked for again.")],
    base_url: Annotated[str | None, typer.Option(help="An OpenAI-compatible endpoint, if not OpenAI's.")] = None,
    tokenizer: Annotated[str, typer.Option(help="Model pack, folder or hub id whose tokens count.")] = "minilm-l6",
    longest: Annotated[int, typer.Option(help="Tokens of a text that is asked for.", min=1)] = 512,
    workers: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 4,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Have a large model shorten texts. The key is read from OPENAI_API_KEY."""
    from ..models.packs import load
    from ..models.packs.quiet import spinner
    from ..text.distill.chunks import sentence_chunks
    from ..text.distill.teacher import ask_into
    from ..text.files import read_text

    documents = [read_text(path) for path in data]
    _check_folder(out)
    _, counter = load(tokenizer)
    texts = [chunk for document in documents for chunk in sentence_chunks(document, counter, longest)]
    with spinner(enabled=not as_json) as tell:
        asked = ask_into(
            out,
            texts,
            teacher,
            base_url=base_url,
            workers=workers,
            progress=lambda done, of: tell(f"{done} of {of} texts"),
        )
    _say(
        as_json,
        {"file": str(out), "texts": len(texts), "asked": asked},
        f"{out}: {asked} of {len(texts)} texts asked for",
    )


@app.command("label")
def label(
    data: Annotated[Path, typer.Option(help="JSONL that `tokenthrift distill teach` wrote.")],
    out: Annotated[Path, typer.Option(help="JSONL to write: texts with a label for each word.")],
    window: Annotated[int, typer.Option(help="How far from the last word the next is looked for.", min=1)] = 150,
    variation: Annotated[float, typer.Option(help="Quantile of the variation rate to stay below.")] = 0.9,
    gap: Annotated[float, typer.Option(help="Quantile of the alignment gap to stay below.")] = 0.9,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Find out which words the teacher kept, and leave out what went wrong."""
    from ..text.distill.quality import Sample, good_samples
    from ..text.distill.teacher import read_jsonl

    pairs = read_jsonl(data, ("text", "compressed"))
    samples = [Sample.of(pair["text"], pair["compressed"], window) for pair in pairs]
    good = good_samples(samples, variation, gap)
    _check_folder(out)
    lines = [json.dumps(sample.to_dict(), ensure_ascii=False) + "\n" for sample in good]
    out.write_text("".join(lines), encoding="utf-8")
    kept = sum(sum(sample.alignment.labels) for sample in good) / max(sum(len(s.spans) for s in good), 1)
    found = {"file": str(out), "samples": len(good), "of": len(samples), "words_kept": kept}
    _say(as_json, found, f"{out}: {len(good)} of {len(samples)} samples, {kept:.0%} of their words kept")


@app.command("train")
def train(
    data: Annotated[Path, typer.Option(help="JSONL that `tokenthrift distill label` wrote.")],
    out: Annotated[Path, typer.Option(help="The folder to write the classifier to.")],
    model: Annotated[str, typer.Option(help="Encoder to start from: model pack, folder or hub id.")] = "minilm-l6",
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-5,
    batch_size: Annotated[int, typer.Option(min=1)] = 10,
    held_out: Annotated[float, typer.Option(help="Share of the samples that are only tested on.")] = 0.2,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Train an encoder to tell which words the teacher would keep."""
    from dataclasses import asdict

    from ..models.packs.quiet import spinner
    from ..text.distill.teacher import read_jsonl
    from ..text.distill.train import for_tokens
    from ..text.distill.train import train as run
    from ..text.spans import words

    samples = [
        (s["text"], words(s["text"]), [bool(x) for x in s["labels"]]) for s in read_jsonl(data, ("text", "labels"))
    ]
    _check_folder(out)
    encoder, tokenizer = for_tokens(model, seed)
    with spinner(enabled=not as_json) as tell:
        report = run(
            encoder,
            tokenizer,
            samples,
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            held_out=held_out,
            seed=seed,
            progress=lambda done, of, loss: tell(f"step {done} of {of}, loss {loss:.3f}"),
            out=out,
        )
    accuracy = report.accuracies[report.best]
    _say(
        as_json,
        {"folder": str(out), **asdict(report)},
        f"{out}: {accuracy:.1%} of the held-out tokens as the teacher ({report.base:.1%} if all were labelled alike); "
        f'use it with llmlingua2(model="{out}")',
    )


def _say(as_json: bool, data: dict[str, Any], text: str) -> None:
    typer.echo(json.dumps(data, ensure_ascii=False) if as_json else text)


def _check_folder(out: Path) -> None:
    if not out.parent.is_dir():
        raise ThriftError(f"cannot write {out}: there is no folder {out.parent}")
