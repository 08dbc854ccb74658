"""Measure plans on a model and data: tasks, metrics, runner, Pareto front, report. See README.md in this folder.

``tokenthrift.bench(...)`` is a function of the public surface and this package has its name, which Python binds over it
on import. So the package can be called too, and does the same.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from .runner import bench

        return bench(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
