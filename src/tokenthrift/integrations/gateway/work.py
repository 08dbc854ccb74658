"""What a worker does: it shortens texts with the library's own ``compress``. Models are loaded once a worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Job:
    """Texts to shorten by one method, each to its rate.

    Attributes:
        pieces: also give the texts in pieces, for the page.
    """

    texts: tuple[str, ...]
    rates: tuple[float | int, ...]
    method: str
    params: dict[str, Any] = field(default_factory=dict)
    question: str | None = None
    protect: Any = None
    pieces: bool = False


@dataclass(frozen=True)
class Shortened:
    """A text after compression, and its tokens.

    Attributes:
        pieces: of the original, in its order: whether each was kept, and its characters.
    """

    text: str
    before: int
    after: int
    pieces: tuple[tuple[bool, str], ...] = ()


@dataclass(frozen=True)
class Compressing:
    """The function that workers run; it travels to their processes, hence names instead of models."""

    tokenizer: str
    scorer: str

    def __call__(self, job: Job) -> list[Shortened]:
        from ...api import compress

        given = {} if job.protect is None else {"protect": job.protect}
        shortened = []
        for text, rate in zip(job.texts, job.rates, strict=True):
            out = compress(
                text,
                job.method,
                rate=rate,
                question=job.question,
                tokenizer=_tokenizer(self.tokenizer),
                scorer=_scorer(self.scorer) if _needs_scorer(job.method) else None,
                **given,
                **job.params,
            )
            pieces = _pieces(text, out.kept) if job.pieces else ()
            shortened.append(Shortened(out.text, out.tokens_before, out.tokens_after, pieces))
        return shortened


def _pieces(text: str, kept: list[tuple[int, int]]) -> tuple[tuple[bool, str], ...]:
    inside = {start for start, _ in kept}
    edges = sorted({0, len(text), *(edge for span in kept for edge in span)})
    return tuple((start in inside, text[start:end]) for start, end in pairwise(edges))


def _needs_scorer(method: str) -> bool:
    from ...core.method import find

    return "scorer" in find(method, "text").needs


def _scorer(name: str) -> Any:
    from ... import api

    return api.load_scorer(name)


@cache
def _tokenizer(name: str) -> Any:
    """The fast tokenizer alone, of a pack, a folder or a hub id: its model is not loaded."""
    if name.startswith("tiktoken:"):
        return name  # compress knows these by name
    from transformers import AutoTokenizer

    from ...core.errors import ThriftError
    from ...models.packs import PACKS, pull
    from ...models.packs.quiet import quiet

    with quiet():
        try:
            return AutoTokenizer.from_pretrained(pull(name) if name in PACKS else name)
        except ThriftError:
            raise
        except Exception as error:  # transformers raises nearly every type for bad files
            raise ThriftError(f"cannot load the tokenizer '{name}': {str(error).splitlines()[0]}") from error
