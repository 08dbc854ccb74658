"""Every attention method, with options that fit prompts of a few dozen tokens. New methods join by themselves."""

from __future__ import annotations

import pytest

import tokenthrift as tt

_OPTIONS = {
    "quest": ", page=4, dense=0",
    "tidal_decode": ", dense=0, reselect=2",
    "token_select": ", sinks=2, local=3",
    "fasa": f", dense=0, chunks={[[[0, 3], [1, 2]]] * 4}",  # of four layers with two key/value heads of eight channels
}
METHODS = [info.name for info in tt.methods(stage="attention")]
EACH = pytest.mark.parametrize("name", METHODS)


def plan(name: str, budget: int, **more: object) -> str:
    """The method with this budget."""
    return f"{name}(budget={budget}{_OPTIONS.get(name, '')}{''.join(f', {k}={v!r}' for k, v in more.items())})"
