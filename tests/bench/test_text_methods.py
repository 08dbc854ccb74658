"""benchmarks/text_methods.py with random models: every part, resuming, the tables, and that a breakage is counted."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tokenthrift.core.errors import ThriftError
from tokenthrift.text import runtime, selection

FEW = ("--quick", "--rates", "0.6", "0.3", "--methods", "bm25_sentences", "truncate")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("text_methods")


def run(script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: Any) -> str:
    monkeypatch.setattr(sys, "argv", ["text_methods.py", *map(str, args)])
    script.main()
    return capsys.readouterr().out


def test_every_part_is_in_the_table_and_a_run_goes_on(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown = run(script, capsys, monkeypatch, *FEW, "--out", tmp_path)
    table = [line for line in shown.splitlines() if line.startswith("| `")]
    assert len(table) == 2 * 2 * 2  # all figures, and recall by kind
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[:4]]
    assert all(cell for row in cells for i, cell in enumerate(row) if i != 1)
    assert [row[1] for row in cells[::2]] == ["yes", ""] and all(row[-1] == "0" for row in cells)
    assert "12 questions about" in shown and "rate 0.3: `bm25_sentences`" in shown

    rows = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + 2 * 4 * 2
    (tmp_path / "results.jsonl").write_text("\n".join([*rows[:-3], rows[-3][:40]]), encoding="utf-8")
    again = run(script, capsys, monkeypatch, *FEW, "--out", tmp_path)
    assert next(line for line in again.splitlines() if line.startswith("#")).startswith("# speed of truncate")
    assert again.count("\n# ") + again.startswith("# ") == 2  # what the cut-off took, and what came after
    found = [json.loads(line)["key"] for line in (tmp_path / "results.jsonl").read_text().splitlines()[1:]]
    assert len(set(found)) == 16
    with pytest.raises(ThriftError, match="different seed"):
        run(script, capsys, monkeypatch, *FEW, "--out", tmp_path, "--seed", "1")


def test_questions_about_one_passage_are_drawn_together(script: ModuleType) -> None:
    interval = script.print_tables.__globals__["interval"]
    low, high = interval([1, 0] * 50, range(100))
    assert 0.35 < low < 0.45 and 0.55 < high < 0.65
    together = interval([1] * 10 + [0] * 10, [0] * 10 + [1] * 10)
    assert together == (0, 1) and interval([1, 1], [0, 1]) == (1, 1)


def test_what_breaks_is_counted(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(selection, "held", lambda *_: [])  # a runtime that protects nothing
    monkeypatch.setattr(runtime, "missing", lambda *_: [])
    args = ("--quick", "--methods", "random_words", "--rates", "0.3", "--parts", "structure", "--out", tmp_path)
    [line] = [line for line in run(script, capsys, monkeypatch, *args).splitlines() if line.startswith("| `")]
    assert int(line.strip("| ").split("|")[-1]) > 5
