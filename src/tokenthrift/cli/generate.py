"""`tokenthrift generate`: try a plan on one prompt, and see what it saved."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ThriftError


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt, or - to read it from standard input.")],
    model: Annotated[str, typer.Option(help="Model pack, folder or hub id.")] = "smollm2-135m",
    plan: Annotated[str, typer.Option(help="A plan or a plan.yaml; empty for the unmodified model.")] = "",
    file: Annotated[
        Path | None,
        typer.Option(help="A text file to put before the prompt, which is then a question about it."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to generate at most.", min=1)] = 64,
    linears: Annotated[
        str,
        typer.Option(help="Product of linear layers (float32, CPU): auto, torch, onednn, or prepacked (more memory)."),
    ] = "auto",
    raw: Annotated[bool, typer.Option("--raw", help="Do not wrap the prompt in the model's chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document at the end instead.")] = False,
) -> None:
    """Generate greedily with a plan, streaming; then print the session's report.

    With a decode plan, what was drafted and accepted is in colour on a terminal.
    """
    from ..core.plan import Plan
    from ..text.files import decode_text, read_text

    question = decode_text(sys.stdin.buffer.read(), "standard input") if prompt == "-" else prompt
    if not question.strip():
        raise ThriftError("the prompt is empty")
    document = read_text(file) if file is not None else ""
    chosen = Plan.of(plan)  # mistakes are told before a model is loaded

    from rich.console import Console
    from rich.markdown import Markdown

    from ..api import apply
    from ..models.packs import load
    from ..models.packs.quiet import quiet
    from .streaming import DraftStreamer

    loaded, tokenizer = load(model)
    if not getattr(loaded, "can_generate", lambda: False)():
        raise ThriftError(f"{model} does not generate text: choose a causal language model")
    with apply(chosen, loaded, processor=tokenizer, linears=linears) as session:
        text, compressed = _shorten(session, chosen, document, question)
        with quiet():  # of its warning that the prompt is long: what is too long is refused below
            inputs = _encode(tokenizer, text, raw).to(loaded.device)
        _check_length(loaded, inputs["input_ids"].shape[1], max_new_tokens)
        streamer = None if as_json else DraftStreamer(tokenizer, Console(highlight=False))
        out = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    new = out[0, inputs["input_ids"].shape[1] :]
    if as_json:
        answer = tokenizer.decode(new, skip_special_tokens=True)
        data = {"text": answer, "tokens": len(new), "report": session.report().to_dict()}
        typer.echo(json.dumps(data, indent=2, ensure_ascii=False))
        return
    if compressed is not None:
        typer.echo(compressed.summary, err=True)
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=132)  # a file or a pipe has no width
    if streamer is not None and streamer.legend is not None:
        console.print(streamer.legend)
    console.print(Markdown(session.report().to_markdown()))


def _shorten(session: Any, plan: Any, document: str, question: str) -> tuple[str, Any]:
    """The text stage shortens the document, or the prompt itself where there is none."""
    if "text" not in plan.stages:
        return "\n\n".join(filter(None, (document, question))), None
    compressed = session.compress(document or question, question if document else None)
    return "\n\n".join(filter(None, (compressed.text, question if document else ""))), compressed


def _check_length(model: Any, prompt: int, new: int) -> None:
    from ..models.decoder import context_length

    room = context_length(model)
    if room is not None and prompt + new > room:
        raise ThriftError(
            f"the prompt has {prompt:,} tokens, with {new:,} to generate that is more than the {room:,} that the model "
            "takes: shorten it, for instance with --plan 'text=truncate(rate=0.5)'"
        )


def _encode(tokenizer: Any, text: str, raw: bool) -> Any:
    if raw or not getattr(tokenizer, "chat_template", None):
        return tokenizer(text=text, return_tensors="pt")  # the first argument of a processor is the image
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
