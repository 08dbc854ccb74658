"""Without a package, one line says which extra has it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from tokenthrift.core.errors import ThriftError
from tokenthrift.integrations.corpus.engines import engine
from tokenthrift.integrations.corpus.inputs import find


def test_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in ("", ".model"):
        monkeypatch.delitem(sys.modules, f"tokenthrift.integrations.lm_eval{name}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tokenthrift\[lm-eval\]'"):
        importlib.import_module("tokenthrift.integrations.lm_eval")


def test_corpora(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ThriftError, match=r"pip install 'tokenthrift\[corpus\]'"):
        find(str(tmp_path / "*.jsonl"), "text", 1000)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ThriftError, match=r"pip install 'tokenthrift\[ray\]'"):
        engine("ray")
