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
    "spatten": ", sinks=2",
    "expected_attention": ", sinks=2, future=16",
    "dapq": ", queries=4",
    "ems": ", window=4, threshold=0.1",
    "speckv": ", window=4, lookahead=3",
    "razor_attention": ", sinks=2, least=0, heads=[]",
    "tca_attention": ", sinks=2, window=4, block=4, heads='even'",
}
_VARIANTS = {
    "snapkv that merges": "snapkv(budget={}, window=4, merge='weighted')",
    "snapkv that merges to middles": "snapkv(budget={}, window=4, group='max', merge='pivot')",
    "pyramid_kv with its window apart": "pyramid_kv(budget={}, window=4, beta=3, apart=True)",
    "ada_kv that mixes": "ada_kv(budget={}, base='snapkv(window=4)', safe='mix', concentration=True)",
}
MERGING = {"ems", "razor_attention"}
"""Their entries may stand for several tokens, so that attention over them is none over a part of the prompt."""
METHODS = [info.name for info in tt.methods(stage="cache")]
EACH = pytest.mark.parametrize("name", METHODS)
EACH_AND_VARIANTS = pytest.mark.parametrize("name", [*METHODS, *_VARIANTS])
EACH_EVICTING = pytest.mark.parametrize("name", [name for name in METHODS if name not in MERGING])


def plan(name: str, budget: float) -> str:
    """The method with this budget."""
    if name in _VARIANTS:
        return _VARIANTS[name].format(budget)
    return f"{name}(budget={budget}{_OPTIONS.get(name, '')})"
