"""`tokenthrift compress --input`: parts, columns, rows that fail, going on, and outputs that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from tokenthrift import api
from tokenthrift.cli.compress import compress
from tokenthrift.core.errors import ThriftError

from ...text.tiny import PROSE, tokenizer

pytest.importorskip("pyarrow", reason="needs the extra: corpus")

import pyarrow as pa
import pyarrow.parquet as pq

from tokenthrift.integrations.corpus import job

app = typer.Typer()
app.command()(compress)
TEXTS = [f"{i}. {line}" for i, line in enumerate(PROSE.split("\n") * 3)]


@pytest.fixture(autouse=True)
def tiny_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "load_tokenizer", lambda name: tokenizer())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    table = pa.table({"id": range(len(TEXTS)), "text": TEXTS, "tags": [["a"], None, ["b", "c"]] * (len(TEXTS) // 3)})
    pq.write_table(table.slice(0, 10), folder / "a.parquet", row_group_size=4)
    pq.write_table(table.slice(10), folder / "b.parquet")
    return folder


def run(pattern: Path | str, output: Path | None, *more: Any) -> Result:
    arguments = ["--input", pattern, *([] if output is None else ["--output", output]), "--method", "truncate"]
    arguments += ["--tokenizer", "tiny", "--part-rows", 3, *more]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def rows(output: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(output.glob("part-*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_parquet(data: Path, tmp_path: Path) -> None:
    told = json.loads(run(data / "*.parquet", tmp_path / "out", "--rate", 0.5, "--json").stdout)
    found = rows(tmp_path / "out")
    assert [row["id"] for row in found] == list(range(len(TEXTS)))
    assert [row["text"] for row in found] == TEXTS
    assert found[2]["tags"] == ["b", "c"]
    for row in found:
        alone = api.compress(row["text"], "truncate", 0.5, tokenizer=tokenizer())
        assert (row["compressed"], row["tokens_before"]) == (alone.text, alone.tokens_before)
        assert row["tokens_after"] == alone.tokens_after
        assert row["notes"] == ("; ".join(alone.notes) or None)
        assert row["error"] is None
    assert told["rows"] == len(TEXTS)
    assert told["parts"] == told["parts_now"] == 4 + -(-(len(TEXTS) - 10) // 3)
    assert told["tokens_after"] == sum(row["tokens_after"] for row in found) < told["tokens_before"]
    assert [pq.read_metadata(f).num_rows for f in sorted((tmp_path / "out").glob("*.parquet"))][:5] == [3, 3, 3, 1, 3]


def test_jsonl_columns_are_those_of_all_files(tmp_path: Path) -> None:
    lines = [
        {"text": TEXTS[0], "n": 1, "x": 1, "many": [1, "a"], "odd": 1},
        {"text": TEXTS[1], "n": None, "x": 0.5, "odd": "word", "flag": True},
        {"text": "half of \ud800 it", "big": 2**70},
    ]
    (tmp_path / "one.jsonl").write_text("\n\n".join(map(json.dumps, lines[:2])) + "\n", encoding="utf-8")
    (tmp_path / "two.ndjson").write_text(json.dumps(lines[2]) + "\nnot json\n[1]\n", encoding="utf-8")
    shown = run(tmp_path / "*.*js*", tmp_path / "out", "--rate", 0.5)
    found = rows(tmp_path / "out")
    assert [row["text"] for row in found] == [TEXTS[0], TEXTS[1], "half of ? it", None, None]
    assert [row["n"] for row in found] == [1, None, None, None, None]
    assert [row["x"] for row in found] == [1.0, 0.5, None, None, None]
    assert [row["odd"] for row in found][:2] == ["1", '"word"']
    assert (found[0]["many"], found[1]["flag"], found[2]["big"]) == ('[1, "a"]', True, str(2**70))
    assert "lone surrogate" in found[2]["error"]
    assert "not valid JSON" in found[3]["error"]
    assert found[4]["error"] == "the line is no JSON object"
    assert [row["compressed"] is None for row in found] == [False, False, True, True, True]
    assert "3 rows failed" in shown.stderr and "lone surrogate" in shown.stderr


def test_rows_that_fail_keep_their_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = api.compress

    def breaks(text: str, *args: Any, **kwargs: Any) -> Any:
        if text.startswith("1."):
            raise RuntimeError("bad luck\nand more")
        return plain(text, *args, **kwargs)

    monkeypatch.setattr(api, "compress", breaks)
    lines = [{"text": TEXTS[0]}, {"text": None}, {"text": 7}, {"other": 1}, {"text": TEXTS[1]}, {"text": ""}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    told = json.loads(run(tmp_path / "in.jsonl", tmp_path / "out", "--json").stdout)
    said = [
        None,
        "there is no text (null)",
        "no text, but int",
        "there is no text (null)",
        "RuntimeError: bad luck",
        None,
    ]
    assert [row["error"] for row in rows(tmp_path / "out")] == said
    assert [row["text"] for row in rows(tmp_path / "out")] == [TEXTS[0], None, "7", None, TEXTS[1], ""]
    assert (told["rows"], told["failed"], told["first_error"]) == (6, 4, said[1])


def test_going_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(data / "*.parquet", tmp_path / "whole")
    out, plain, written = tmp_path / "out", job.write, []

    def stops(table: Any, file: Path) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(file.name)
        plain(table, file)

    monkeypatch.setattr(job, "write", stops)
    assert run(data / "*.parquet", out).exit_code == 130
    assert sorted(written) == sorted(p.name for p in out.glob("*.parquet"))
    (out / ".part-000005.parquet.0.tmp").write_bytes(b"half")
    states = {p: p.stat().st_mtime_ns for p in out.glob("*.parquet")}
    monkeypatch.setattr(job, "write", plain)
    told = json.loads(run(data / "*.parquet", out, "--json").stdout)
    assert told["parts"] - told["parts_now"] == 3
    assert {p: p.stat().st_mtime_ns for p in states} == states
    assert rows(out) == rows(tmp_path / "whole")
    assert not list(out.glob("*.tmp")) and not list(out.glob(".*.tmp"))
    again = run(data / "*.parquet", out)
    assert "were done before" in again.stderr


def test_what_is_written_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(table: Any, out: Any) -> None:
        out.write(b"PAR1")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", breaks)
    with pytest.raises(OSError, match="disk full"):
        job.write(pa.table({"a": [1]}), tmp_path / "part.parquet")
    assert list(tmp_path.iterdir()) == []


def refused(message: str, *arguments: Any) -> None:
    with pytest.raises(ThriftError, match=message) as error:
        run(*arguments)
    assert "\n" not in str(error.value)


def test_an_output_that_does_not_fit(data: Path, tmp_path: Path) -> None:
    pattern, out = data / "*.parquet", tmp_path / "out"
    run(pattern, out, "--rate", 0.5)
    kept = rows(out)
    refused(r"other settings \(params was .*0.5.*now .*0.4", pattern, out, "--rate", 0.4)
    refused(r"other settings \(part_rows was 3, now 4", pattern, out, "--rate", 0.5, "--part-rows", 4)
    refused(r"other inputs \(.*b.parquet is gone", data / "a.parquet", out, "--rate", 0.5)
    (data / "c.parquet").write_bytes((data / "a.parquet").read_bytes())
    refused(r"other inputs \(.*c.parquet is new", pattern, out, "--rate", 0.5)
    (data / "c.parquet").unlink()
    pq.write_table(pa.table({"text": TEXTS}), data / "a.parquet")
    refused(r"other inputs \(.*a.parquet has changed", pattern, out, "--rate", 0.5)
    assert rows(out) == kept
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refused("holds other files, such as notes.txt", pattern, tmp_path / "mine")


def test_one_run_at_a_time(data: Path, tmp_path: Path) -> None:
    from tokenthrift.integrations.corpus.folder import locked

    with locked(tmp_path / "out"):
        refused("another run is writing", data / "*.parquet", tmp_path / "out")
    run(data / "*.parquet", tmp_path / "out")


def test_mistakes(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, out = data / "*.parquet", tmp_path / "out"
    refused("no file fits --input", data / "*.json", out)
    refused("has no column 'txt'.*did you mean 'text'", pattern, out, "--column", "txt")
    refused("--input needs --output", pattern, None)
    refused("is a file: give a folder", pattern, data / "a.parquet")
    refused("unknown --engine rai: did you mean 'ray'", pattern, out, "--engine", "rai")
    refused("--workers is", pattern, out, "--workers", 2)
    refused("--part-rows 0", pattern, out, "--part-rows", 0)
    refused("keep ratio 1.5 is outside", pattern, out, "--rate", 1.5)
    refused("did you mean 'json'", pattern, out, "--protect", "jsn")
    refused("--question", pattern, out, "--method", "bm25_sentences")
    refused("no number of tokens", pattern, out, "--chunk", 0)
    refused("leave out FILE", pattern, out, "--messages")
    (data / "d.csv").write_text("text\n")
    refused("neither .parquet nor .jsonl", data / "*", out)
    (data / "e.parquet").write_text("no")
    refused("cannot read .*e.parquet as Parquet", data / "e*", out)
    pq.write_table(pa.table({"text": ["a"], "error": ["b"]}), data / "f.parquet")
    refused("has a column 'error'", data / "f*", out)
    with pytest.raises(ThriftError, match="name its files with --input"):
        result = CliRunner().invoke(app, ["--engine", "ray"])
        raise result.exception or AssertionError
    assert not out.exists()
    monkeypatch.setattr(api, "load_tokenizer", _unknown)
    refused("cannot load the tokenizer", data / "a.parquet", out)
    monkeypatch.undo()
    monkeypatch.setattr(api, "load_tokenizer", lambda name: tokenizer())
    run(data / "a.parquet", out, "--tokenizer", "other")  # nothing was done yet, so nothing is in the way
    assert len(rows(out)) == 10


def _unknown(name: str) -> Any:
    raise ThriftError(f"cannot load the tokenizer '{name}'")
