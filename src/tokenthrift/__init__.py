"""Tokenthrift: token reduction for transformers, as methods that run on unmodified models and are measured fairly.

The public surface is what is listed in ``__all__``; names are imported on first use, so that importing is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Plan": "core.plan",
    "Budget": "core.budget",
    "Schedule": "core.budget",
    "TokenMap": "core.tokenmap",
    "View": "core.view",
    "Session": "core.session",
    "ThriftError": "core.errors",
    "method": "core.method",
    "methods": "core.method",
    "apply": "api",
    "compress": "api",
    "compress_messages": "api",
    "acompress": "api",
    "pack": "models.prepacking",
    "load": "models.packs",
    "bench": "api",
    "tune": "api",
}
__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from .api import acompress, apply, bench, compress, compress_messages, tune
    from .core.budget import Budget, Schedule
    from .core.errors import ThriftError
    from .core.method import method, methods
    from .core.plan import Plan
    from .core.session import Session
    from .core.tokenmap import TokenMap
    from .core.view import View
    from .models.packs import load
    from .models.prepacking import pack


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tokenthrift' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
