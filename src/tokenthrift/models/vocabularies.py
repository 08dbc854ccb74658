"""Whether two models number the same tokens alike: the one rule of all that draft with another model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..core.errors import ThriftError

PADDING = 0.01
"""Vocabularies that differ by no larger share are the same: sizes of one model are padded to different numbers."""


def check_vocabulary(method: str, target: Any, draft: Any, tokenizer: Any = None, draft_tokenizer: Any = None) -> None:
    """Refuse a draft model whose tokens are not the target's, for methods that cannot translate them.

    Raises:
        ThriftError: they differ.
    """
    if not same_vocabulary(target, draft, tokenizer, draft_tokenizer):
        raise ThriftError(other_vocabulary(method, target, draft, "choose a draft model of the same tokenizer"))


def same_vocabulary(target: Any, draft: Any, tokenizer: Any = None, draft_tokenizer: Any = None) -> bool:
    """Whether equal numbers are equal tokens, but for a share of at most :data:`PADDING`.

    By the strings of the tokenizers; one that is not given is looked for in the folder that its model was loaded from.
    Where one is missing, by how many tokens there are.
    """
    if draft is target:
        return True
    one, other = strings_of(target, tokenizer), strings_of(draft, draft_tokenizer)
    if one is None or other is None:
        counts = size_of(target), size_of(draft)
        return abs(counts[0] - counts[1]) <= PADDING * max(counts)
    equal = one is other or sum(one.get(string) == number for string, number in other.items())
    return equal is True or equal >= (1 - PADDING) * max(len(one), len(other))


def other_vocabulary(method: str, target: Any, draft: Any, advice: str) -> str:
    """The sentence that says so, and what to do."""
    return (
        f"{method} cannot use this draft model, which has another vocabulary: it has {size_of(draft):,} tokens and the "
        f"target {size_of(target):,}; {advice}"
    )


def size_of(model: Any) -> int:
    """Tokens of a model, padding included."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def strings_of(model: Any, tokenizer: Any = None) -> Mapping[str, int] | None:
    """The tokens of a model's tokenizer by their strings; None if there is none to ask."""
    if tokenizer is None:
        return _of_folder(str(getattr(model.config, "_name_or_path", None) or ""))
    if not hasattr(tokenizer, "get_vocab"):
        tokenizer = getattr(tokenizer, "tokenizer", None)  # a processor's
    strings: Mapping[str, int] | None = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None
    return strings


@lru_cache(maxsize=4)
def _of_folder(folder: str) -> Mapping[str, int] | None:
    if not folder or not Path(folder).is_dir():
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):
        return None
    return strings_of(None, tokenizer)
