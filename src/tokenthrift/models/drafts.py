"""Draft models as methods are given them: by name, or as an object."""

from __future__ import annotations

from functools import lru_cache
from os import PathLike, fspath
from typing import Any

import torch
from torch import nn

from ..core.errors import ThriftError


class Given:
    """A model that was passed in as an object; plans print it by its class."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __repr__(self) -> str:
        return f"<{type(self.model).__name__}>"


def as_draft(method: str, parameter: str, model: Any) -> Any:
    """What a method keeps of the draft model that it was given: its name, or the object as :class:`Given`.

    Raises:
        ThriftError: it is neither.
    """
    if isinstance(model, nn.Module):
        return Given(model)
    if not isinstance(model, str | PathLike | Given) or not (isinstance(model, Given) or fspath(model)):
        raise ThriftError(f"{method} needs {parameter} as a pack, folder, hub id or loaded model, not {model!r}")
    return model


@lru_cache(maxsize=2)
def load_draft(name: str, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A draft model and its tokenizer; kept for the next request."""
    from .packs import load

    return load(name, device=device, dtype=dtype)
