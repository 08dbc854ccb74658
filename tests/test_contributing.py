"""The worked example of CONTRIBUTING.md is a method that works as written."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

from tiny_models import prompt, tiny
from tokenthrift.core.method import _registry

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_worked_example_runs(monkeypatch, capsys):
    method_file, use = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.setattr("tokenthrift.core.method._registry", _registry)
    module = types.ModuleType("vnorm_example")
    monkeypatch.setitem(sys.modules, "vnorm_example", module)
    try:
        exec(compile(method_file, "vnorm.py", "exec"), module.__dict__)
        exec(compile(use, "use.py", "exec"), {"model": tiny("llama"), "inputs": prompt()})
    finally:
        _registry.pop("vnorm", None)
    assert "| cache | 2 |" in capsys.readouterr().out
