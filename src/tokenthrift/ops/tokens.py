"""Where the tokens of a tokenizer lie in a text. All that the text stage and the scorers need of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.errors import ThriftError

Span = tuple[int, int]
"""Start and end (exclusive) in characters."""


def encode(tokenizer: Any, texts: Sequence[str]) -> list[tuple[list[int], list[Span]]]:
    """Token ids of each text, without special tokens, and the characters that each token covers.

    The spans leave no gap: what a tokenizer skips (white space, mostly) belongs to the token after it, or to the last
    one. The tokens of a character that takes several (an emoji in a byte-level vocabulary) overlap.

    Raises:
        ThriftError: the tokenizer is a slow one, which cannot say where its tokens lie.
    """
    if not texts:
        return []
    if not getattr(tokenizer, "is_fast", False):
        raise ThriftError(
            f"{type(tokenizer).__name__} does not give character offsets: "
            "pass a fast tokenizer, e.g. AutoTokenizer.from_pretrained(...)"
        )
    batch = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = map(_close_gaps, batch["offset_mapping"], map(len, texts))
    return list(zip(batch["input_ids"], spans, strict=True))


def token_spans(tokenizer: Any, text: str) -> list[Span]:
    """The characters of each token of ``text``; see :func:`encode`."""
    return encode(tokenizer, [text])[0][1]


def count_tokens(tokenizer: Any, text: str) -> int:
    """Number of tokens of ``text``, special tokens left out."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else 0


def _close_gaps(offsets: Sequence[Span], length: int) -> list[Span]:
    spans: list[Span] = []
    reached = 0
    for start, end in offsets:
        spans.append((min(start, reached), max(start, end)))
        reached = max(reached, end)
    if spans:
        spans[-1] = (spans[-1][0], length)
    return spans
