"""Which tokens are the pieces of one identifier, read off the marks that tokenizers give their pieces.

The language of the text is not known, so the lexer is the one that programming languages agree on: an identifier is a
run of letters, digits and underscores that does not begin with a digit. Bytes of UTF-8 beyond ASCII count as letters.
A number is no identifier; a keyword or a plain word in several pieces is treated like one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import digits
from typing import Any, Literal

import torch
from torch import Tensor

Style = Literal["wordpiece", "bytes", "sentencepiece"]
"""How pieces are marked: ``##`` continues a word; or ``Ġ`` (byte-level BPE), ``▁`` stand for the space before one.

WordPiece tokenizers of the BERT kind cut at every underscore and forget the spaces, so there the parts of
``snake_case`` cannot be told from words side by side: the pieces of each part are merged, the parts are not.
"""

_MARKS: dict[Style, str] = {"wordpiece": "##", "bytes": "Ġ", "sentencepiece": "▁"}
_NAME = re.compile(r"\w+")
# Byte-level vocabularies write byte 0xA1 as U+00A1 and so on, but 0x7F-0xA0 and 0xAD as U+0121-U+0143.
_BYTE_NAME = re.compile("[A-Za-z0-9_\u00a1-\u00ff\u0122-\u0143]+")


def identifier_groups(tokens: Sequence[str], style: Style | None = None) -> list[int]:
    """The group of each token: 0, 1, ...; the pieces of one identifier share theirs, all other tokens are alone.

    Args:
        tokens: as ``tokenizer.convert_ids_to_tokens`` gives them, special tokens included.
        style: how pieces are marked; None guesses it from these tokens, which fails where no token has a mark.
    """
    style = style or _style(tokens)
    kinds = torch.tensor([_kind(token, style) for token in tokens], dtype=torch.uint8)
    return _groups(kinds.unsqueeze(0))[0].tolist()


@dataclass(frozen=True)
class IdentifierSegments:
    """:func:`identifier_groups` for batches of token ids, by a table over the tokenizer's vocabulary."""

    kinds: Tensor
    """Per id of the vocabulary: see :func:`_kind`."""

    @classmethod
    def of(cls, tokenizer: Any) -> IdentifierSegments:
        """The table of a tokenizer, made once: it reads the whole vocabulary."""
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        special = set(tokenizer.all_special_ids)
        style = _style(list(vocabulary))
        kinds = torch.zeros(max(vocabulary.values(), default=-1) + 1, dtype=torch.uint8)
        ids = [i for i in vocabulary.values() if i not in special]
        named = tokenizer.convert_ids_to_tokens(ids)
        kinds[ids] = torch.tensor([_kind(token, style) for token in named], dtype=torch.uint8)
        return cls(kinds)

    def __call__(self, input_ids: Tensor) -> Tensor:
        """``(batch, tokens)`` int64 to the same shape: the group of each token, counted from 0 in each row."""
        return _groups(self.kinds.to(input_ids.device)[input_ids])


_OTHER, _HEAD, _NUMBER, _TAIL, _TAIL_NUMBER = range(5)


def _kind(token: str, style: Style) -> int:
    """What a token can be in an identifier: nothing, its head, or its tail too; a head that is a digit, a number's."""
    mark = _MARKS[style]
    marked = token.startswith(mark)
    body = token.removeprefix(mark)
    if not (_BYTE_NAME if style == "bytes" else _NAME).fullmatch(body):
        return _OTHER
    digit = body[0] in digits
    if marked == (style == "wordpiece"):
        return _TAIL_NUMBER if digit else _TAIL
    return _NUMBER if digit else _HEAD


def _groups(kinds: Tensor) -> Tensor:
    """``(batch, tokens)`` kinds to groups."""
    tail = kinds >= _TAIL
    joins = torch.zeros_like(tail)
    joins[:, 1:] = tail[:, 1:] & (kinds[:, :-1] != _OTHER)
    group = joins.logical_not().cumsum(-1) - 1
    # What began with a digit was a number: its pieces stay apart.
    number = (kinds == _NUMBER) | (kinds == _TAIL_NUMBER)
    heads = (number & ~joins).to(torch.uint8)
    number = torch.zeros_like(heads).scatter_reduce_(1, group, heads, "amax").gather(1, group)
    return (~joins | (number > 0)).cumsum(-1) - 1


def _style(tokens: Sequence[str]) -> Style:
    """The mark that begins most tokens."""
    counts = {style: sum(token.startswith(mark) for token in tokens) for style, mark in _MARKS.items()}
    return max(counts, key=lambda style: counts[style])
