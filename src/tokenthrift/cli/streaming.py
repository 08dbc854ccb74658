"""Text as it is generated, with what was drafted highlighted."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..core.draft import ROOT, Draft
from ..decoding.verify import Verdict

STYLES = ("green", "cyan", "magenta", "yellow", "blue")
"""Of the sources of drafts, in the order in which they appear."""


class DraftStreamer(BaseStreamer):
    """Prints one sequence while it is generated: on a terminal in the colour of where a token's draft came from, plain
    where the model itself said it; elsewhere without colours.

    Args:
        tokenizer: turns tokens into text.
        console: where to.
    """

    def __init__(self, tokenizer: Any, console: Console) -> None:
        self.tokenizer, self.console = tokenizer, console
        self.styles: dict[str, str] = {}
        self._sources: deque[str | None] = deque()  # of the tokens that come next
        self._line: list[int] = []
        self._shown = ""  # of the line
        self._prompt = True

    def on_step(self, drafts: Sequence[Draft | None], verdicts: Sequence[Verdict]) -> None:
        """Hear which of the next tokens were drafted: those on a path of the draft, down from its root."""
        for draft, verdict in zip(drafts, verdicts, strict=True):
            node: int | None = ROOT
            for token in verdict.tokens:
                node = None if draft is None or node is None else draft.child(node, token)
                self._sources.append(None if draft is None or node is None else draft.source(node))

    def put(self, value: Tensor) -> None:
        """Print tokens, but for the first ones, the prompt. Characters of several tokens wait for the last."""
        if self._prompt:
            self._prompt = False
            return
        for token in value.flatten().tolist():
            source = self._sources.popleft() if self._sources else None
            self._line.append(token)
            text = self.tokenizer.decode(self._line, skip_special_tokens=True)
            if text.endswith("\ufffd"):
                continue
            self._print(text[len(self._shown) :], source)
            self._shown = text
            if text.endswith("\n"):  # so that no text is decoded again and again
                self._line, self._shown = [], ""

    def end(self) -> None:
        """Print what still waits, and end the line."""
        text = self.tokenizer.decode(self._line, skip_special_tokens=True)
        self._print(text[len(self._shown) :] + "\n", None)

    @property
    def legend(self) -> Text | None:
        """What the colours say; None without any."""
        if not self.styles or not self.console.is_terminal:
            return None
        return Text("drafted by: ").append_text(Text(", ").join(Text(s, style) for s, style in self.styles.items()))

    def _print(self, text: str, source: str | None) -> None:
        if not self.console.is_terminal:
            self.console.file.write(text)
            self.console.file.flush()
            return
        style = "" if source is None else self.styles.setdefault(source, STYLES[len(self.styles) % len(STYLES)])
        self.console.print(Text(text, style), end="", soft_wrap=True)
