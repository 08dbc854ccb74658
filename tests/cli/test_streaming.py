"""What is printed while text is generated: every character once and in order, drafted tokens in colour."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from rich.console import Console

from tokenthrift.cli.streaming import DraftStreamer
from tokenthrift.core.draft import Draft
from tokenthrift.decoding.verify import Verdict

from ..bench.tiny import tiny_tokenizer


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


def streamer_of(tokenizer: Any, terminal: bool) -> tuple[DraftStreamer, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, color_system="standard" if terminal else None, width=20)
    return DraftStreamer(tokenizer, console), file


def feed(streamer: DraftStreamer, tokenizer: Any, steps: list[tuple[Draft, str]]) -> None:
    """The prompt, a token of the prefill, then steps that commit a text each."""
    streamer.put(torch.tensor([[1, 2, 3]]))
    streamer.put(torch.tensor(tokenizer("A")["input_ids"]))
    for draft, text in steps:
        tokens = tokenizer(text)["input_ids"]
        streamer.on_step([draft], [Verdict(tokens, [])])
        for token in tokens:
            streamer.put(torch.tensor([token]))
    streamer.end()


def test_elsewhere_than_on_a_terminal_text_is_plain_and_complete(tokenizer: Any) -> None:
    streamer, file = streamer_of(tokenizer, terminal=False)
    feed(streamer, tokenizer, [(Draft.chain(tokenizer("bc")["input_ids"]), "bcd"), (Draft(), "\tä€🙂\n\nlong " * 9)])
    assert file.getvalue() == "Abcd" + "\tä€🙂\n\nlong " * 9 + "\n"
    assert streamer.legend is None


def test_a_character_left_open_is_shown_at_the_end(tokenizer: Any) -> None:
    streamer, file = streamer_of(tokenizer, terminal=False)
    streamer.put(torch.tensor([[1]]))
    streamer.put(torch.tensor(tokenizer("a€")["input_ids"][:-1]))
    assert file.getvalue() == "a"
    streamer.end()
    assert file.getvalue() == "a\ufffd\n"


def test_accepted_drafts_have_the_colour_of_their_source(tokenizer: Any) -> None:
    streamer, file = streamer_of(tokenizer, terminal=True)
    b, c, x = (tokenizer(text)["input_ids"][0] for text in "bcx")
    # x and b follow "A"; below b stands c. The first step commits b, c and d, the second x, that was not drafted.
    tree = Draft([x, b, c], [-1, -1, 1], sources=["guess", "copy", "matrix"])
    feed(streamer, tokenizer, [(tree, "bcd"), (Draft.chain([b]), "x"), (tree, "xb")])
    shown = file.getvalue()
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == "AbcdxxB\n".replace("B", "b")
    coloured = re.findall(r"\x1b\[(\d+)m(.*?)\x1b\[0m", shown)
    assert coloured == [("32", "b"), ("36", "c"), ("35", "x")]
    assert streamer.legend is not None and streamer.legend.plain == "drafted by: copy, matrix, guess"
