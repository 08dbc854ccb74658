"""What suites of questions have in common: lengths, what they can be measured on, their flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ..core.errors import ThriftError
from .data import Data
from .haystack import Haystack
from .tasks import Case


@dataclass(frozen=True)
class Questions:
    """A suite of questions about prompts of exact lengths, in the model's own tokens, the question included.

    Args:
        lengths: of the prompts.
        samples: cases in every cell of the table of scores, each with its own text and its own secret.
        question_later: the question comes when the prompt has been reduced already, as when one cache serves many
            questions; else it is the end of the prompt.
    """

    name: str = ""
    lengths: tuple[int, ...] = ()
    samples: int = 1
    question_later: bool = False
    repeats: int = 0

    note: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not self.lengths or not all(isinstance(n, int) and n > 0 for n in self.lengths):
            raise ThriftError("the lengths must be whole numbers of tokens, such as --lengths 1024,2048")
        if self.samples < 1:
            raise ThriftError(f"there must be at least 1 sample, not {self.samples}")

    def usable(self, data: Data) -> Data:
        """The documents, in which things are hidden."""
        if not data.documents:
            raise ThriftError(
                f"the suite '{self.name}' hides what is asked for in text: give --data with text or Markdown, or leave "
                "--data out"
            )
        return Data(data.source, data.documents)

    def cases(self, data: Data, tokenizer: Any, seed: int, limit: int | None) -> list[Case]:
        """All cases, the shortest first; the same for the same data, tokenizer and seed.

        Raises:
            ThriftError: a length that is too short for what is to be hidden, or too long for the model.
        """
        found = list(self.ask(Haystack(data, tokenizer), seed))
        for case, length in found:
            if limit is not None and length + case.new_tokens > limit:
                raise ThriftError(
                    f"a prompt of {length:,} tokens and an answer of up to {case.new_tokens} ({case.id}) are beyond "
                    f"the {limit:,} tokens that the model takes: give shorter --lengths"
                )
        return [case for case, _ in found]

    def ask(self, haystack: Haystack, seed: int) -> Iterator[tuple[Case, int]]:
        """Cases and their lengths."""
        raise NotImplementedError

    def flags(self) -> list[str]:
        """Words of a command line that make this suite out of the one with its name."""
        words: list[str] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default or field.name in ("name", "repeats"):
                continue
            words.append("--" + field.name.replace("_", "-"))
            if not isinstance(value, bool):
                words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
        return words
