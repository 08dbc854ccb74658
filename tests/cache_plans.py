"""Every cache method, with options that fit prompts of a few dozen tokens. New methods join by themselves."""

from __future__ import annotations

import pytest

import tokenthrift as tt

_OPTIONS = {
    "snapkv": ", window=4",
    "pyramid_kv": ", window=4, beta=3",
    "ada_kv": ", base='snapkv(window=4)'",
    "lagkv": ", sinks=2, lag=5",
    "tree_kv": ", sinks=2, block=2",
    "expected_attention": ", sinks=2, future=16",
}
METHODS = [info.name for info in tt.methods(stage="cache")]
EACH = pytest.mark.parametrize("name", METHODS)


def plan(name: str, budget: float) -> str:
    """The method with this budget."""
    return f"{name}(budget={budget}{_OPTIONS.get(name, '')})"
