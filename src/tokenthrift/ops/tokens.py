"""Where the tokens of a tokenizer lie in a text. All that the text stage and the scorers need of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

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


def token_ends(tokenizer: Any, text: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where each token ends, the last with the text: what :func:`token_spans` says of it, for long texts."""
    if not text:
        return np.zeros(0, dtype=np.int64)
    batch = tokenizer([text], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(batch["offset_mapping"][0], dtype=np.int64).reshape(-1, 2)
    ends: np.ndarray[Any, np.dtype[np.int64]] = offsets.max(axis=1)
    ends[-1:] = len(text)
    return ends


def count_tokens(tokenizer: Any, text: str) -> int:
    """Number of tokens of ``text``, special tokens left out."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else 0


class TiktokenTokenizer:
    """A ``tiktoken`` encoding, called as the library calls any tokenizer."""

    is_fast = True

    def __init__(self, encoding: Any) -> None:
        self.encoding = encoding

    def __call__(self, text: str | list[str], **_: Any) -> dict[str, Any]:
        if isinstance(text, str):
            return {"input_ids": self.encoding.encode_ordinary(text)}
        rows = [self.encoding.encode_ordinary(t) for t in text]
        return {"input_ids": rows, "offset_mapping": [self._offsets(ids) for ids in rows]}

    def _offsets(self, ids: list[int]) -> list[Span]:
        spans, reached = [], 0
        for piece in self.encoding.decode_tokens_bytes(ids):
            if piece.isascii():
                spans.append((reached, reached + len(piece)))
                reached += len(piece)
                continue
            follows = [0x80 <= byte < 0xC0 for byte in piece]  # bytes that go on with a character begun before
            start = reached - follows[0]
            reached += len(piece) - sum(follows)
            spans.append((start, reached))
        return spans


def as_tokenizer(value: Any) -> Any:
    """What counts tokens, from what a user has: a tokenizer, a processor with one, or a ``tiktoken`` encoding.

    Raises:
        ThriftError: it is none of these.
    """
    if type(value).__module__.split(".")[0] == "tiktoken":
        return TiktokenTokenizer(value)
    value = getattr(value, "tokenizer", value)
    if not callable(value):
        raise ThriftError(
            f"{type(value).__name__} counts no tokens: pass a tokenizer, e.g. AutoTokenizer.from_pretrained(...), "
            "or tiktoken.get_encoding(...)"
        )
    return value


def load_tiktoken(name: str) -> TiktokenTokenizer:
    """A ``tiktoken`` encoding by its own name or that of a model, e.g. ``o200k_base`` or ``gpt-4o``.

    Raises:
        ThriftError: ``tiktoken`` is not installed, does not know the name, or cannot fetch the vocabulary.
    """
    try:
        import tiktoken
    except ImportError:
        raise ThriftError(
            "tiktoken is not installed: run pip install 'tokenthrift[tiktoken]', or name another tokenizer"
        ) from None
    try:
        known = name in tiktoken.list_encoding_names()
        return TiktokenTokenizer(tiktoken.get_encoding(name) if known else tiktoken.encoding_for_model(name))
    except KeyError:
        names = ", ".join(tiktoken.list_encoding_names())
        raise ThriftError(f"tiktoken knows no encoding or model '{name}'; its encodings are {names}") from None
    except Exception as error:  # the vocabulary is fetched from the network, by whatever client it likes
        raise ThriftError(f"tiktoken cannot load '{name}': {error}") from None


def _close_gaps(offsets: Sequence[Span], length: int) -> list[Span]:
    spans: list[Span] = []
    reached = 0
    for start, end in offsets:
        spans.append((min(start, reached), max(start, end)))
        reached = max(reached, end)
    if spans:
        spans[-1] = (spans[-1][0], length)
    return spans
