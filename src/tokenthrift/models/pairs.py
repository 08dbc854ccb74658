"""Models that a method is given beside the default ones: by name, or as an object with its tokenizer."""

from __future__ import annotations

from functools import lru_cache
from os import PathLike, fspath
from typing import Any

from ..core.errors import ThriftError


class Pair:
    """A model and its tokenizer that were passed in as objects; plans print them by the model's class."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def __repr__(self) -> str:
        return f"<{type(self.model).__name__}>"


def as_pair(method: str, model: Any) -> str | Pair | None:
    """What a method keeps of the model that it was given: its name, the objects as :class:`Pair`, or None.

    Raises:
        ThriftError: it is something else.
    """
    if model is None or isinstance(model, Pair):
        return model
    if isinstance(model, tuple) and len(model) == 2:
        return Pair(*model)
    if isinstance(model, str | PathLike) and fspath(model):
        return fspath(model)
    raise ThriftError(f"{method} takes model as a pack, folder, hub id or (model, tokenizer), not {model!r}")


def open_pair(model: str | Pair) -> tuple[Any, Any]:
    """The model and its tokenizer; those loaded by name are kept for the next call."""
    return (model.model, model.tokenizer) if isinstance(model, Pair) else _load(model)


@lru_cache(maxsize=4)
def _load(name: str) -> tuple[Any, Any]:
    from .packs import load

    return load(name)
