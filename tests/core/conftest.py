"""Toy methods in a registry of their own: the tests of the core need no real method, and leave none behind."""

from dataclasses import field
from functools import cache
from typing import Any

import pytest

from tokenthrift.core import method as registry
from tokenthrift.core.method import method
from tokenthrift.core.tokenmap import TokenMap
from tokenthrift.core.view import View


def make_toys() -> None:
    @method("topk", stage="cache", paper="Toys", arxiv="0000.00001", needs=("keys",))
    class TopK:
        """Keep a few.

        More words.
        """

        keep: Any = 1.0
        mode: Any = "mean"
        scale: Any = 1.0
        heads: Any = None
        sink: Any = False

        def reduce(self, view: View) -> TokenMap:
            raise NotImplementedError

    @method("window", stage="cache", paper="Toys", status="partial")
    class Window:
        """Keep the last ``size``."""

        size: Any
        limit: Any = float("inf")
        weights: Any = field(default_factory=lambda: [1, 2])
        hidden: int = field(init=False, default=3)

    @method("patches", stage="vision", paper="Toys")
    class Patches:
        ratio: Any = 0.5
        pairs: Any = ((1, 2), "a")

    @method("squeeze", stage="text", paper="Toys")
    class Squeeze:
        rate: Any = 0.5


@pytest.fixture(scope="module")
def toys():
    """The toy methods by name; nothing else is registered while the fixture lives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_registry", {})
        patch.setattr(registry, "_discover", lambda: None)
        make_toys()
        yield {name: info.cls for name, info in registry._registry.items()}


@pytest.fixture(autouse=True)
def only_toys(request):
    """Every test of the core sees the toys alone."""
    request.getfixturevalue("toys")


discover_for_real = registry._discover  # before the toys take its place


@pytest.fixture
def discover(monkeypatch):
    """Discovery, of no family and of the entry points that a test puts into the list."""
    found = []
    monkeypatch.setattr(registry, "_registry", {})
    monkeypatch.setattr(registry, "FAMILIES", ())
    monkeypatch.setattr(registry, "_discover", cache(discover_for_real.__wrapped__))
    monkeypatch.setattr(registry, "entry_points", lambda group: [e for e in found if e.group == group])
    return found
