"""The command line as users see it: exit codes, one line a mistake, JSON on standard output only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tokenthrift
from tokenthrift.bench import tasks
from tokenthrift.cli import main

from ..bench.tiny import SUITE, a_text, save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.SUITES, "quick", SUITE)


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    capsys.readouterr()  # what was printed before does not count
    with pytest.raises(SystemExit) as exit:
        main.run([*map(str, args)])
    out, err = capsys.readouterr()
    return int(exit.value.code or 0), out, err


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    code, out, err = call(capsys, *args)
    assert code == 2
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_bench_prints_json_only(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    text = tmp_path / "own.md"
    text.write_text(a_text(), encoding="utf-8")
    out = tmp_path / "out"
    args = ("--model", model, "--data", str(text), "--plans", "cache=knorm(budget=40)", "--out", str(out))
    code, stdout, _ = call(capsys, "bench", *args, "--json")
    assert code == 0
    found = json.loads(stdout)
    assert [p["name"] for p in found["sections"][0]["plans"]] == ["unmodified", "cache=knorm(budget=40)"]
    assert {f.name for f in out.iterdir()} == {"plan.yaml", "report.html", "results.jsonl"}

    code, stdout, _ = call(capsys, "bench", *args)  # all rows are there, so this is quick
    assert code == 0
    assert "cache=knorm(budget=40)" in stdout
    assert "different seed" in refused(capsys, "bench", *args, "--seed", "1")


def test_bad_requests(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    empty, binary, lines = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "lines.jsonl"
    empty.write_text("")
    binary.write_bytes(b"\0\1")
    lines.write_text('{"prompt": "a"}\n{"prompt"\n')
    plans = tmp_path / "plans.yaml"
    plans.write_text("- [")
    out = ("--out", str(tmp_path / "out"), "--plans", "cache=knorm(budget=40)")
    assert "cannot load 'nonsense'" in refused(capsys, "bench", "--model", "nonsense", *out)
    assert "empty" in refused(capsys, "bench", "--model", model, "--data", str(empty), *out)
    assert "binary" in refused(capsys, "bench", "--model", model, "--data", str(binary), *out)
    assert "line 2" in refused(capsys, "bench", "--model", model, "--data", str(lines), *out)
    assert "there is no file" in refused(capsys, "bench", "--model", model, "--data", str(tmp_path / "nothing"), *out)
    assert "knorn" in refused(capsys, "bench", "--model", model, *out, "--plans", "cache=knorn()")
    assert "not valid YAML" in refused(capsys, "bench", "--model", model, *out, "--plans", str(plans))
    assert "unknown suite" in refused(capsys, "bench", "--model", model, *out, "--suite", "large")
    assert "cannot write" in refused(capsys, "bench", "--model", model, "--out", str(empty / "x"))


def test_suites_of_questions(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ("--model", model, "--plans", "cache=knorm(budget=40)", "--out", str(out))
    args = ("bench", *common, "--suite", "needle", "--lengths", "250, 300", "--depths", "0,33.3")
    code, stdout, _ = call(capsys, *args, "--json")
    assert code == 0
    [section] = json.loads(stdout)["sections"]
    assert (section["grids"][0]["rows"], section["grids"][0]["columns"]) == (["0%", "33.3%"], ["250", "300"])
    assert {f.name for f in out.iterdir()} == {"plan.yaml", "report.html", "results.jsonl", "scores.md"}
    code, stdout, _ = call(capsys, *args)  # all rows are there, so this is quick
    assert code == 0
    assert "score" in stdout and "250" in stdout

    needle, ruler = ("bench", *common, "--suite", "needle"), ("bench", *common, "--suite", "ruler")
    assert "--lengths takes numbers with commas" in refused(capsys, *needle, "--lengths", "1k")
    assert "whole numbers of tokens" in refused(capsys, *needle, "--lengths", "512.5")
    assert "whole numbers of tokens" in refused(capsys, *needle, "--lengths", "inf,nan")
    assert "beyond the 2,048 tokens" in refused(capsys, *needle, "--lengths", "4096")
    assert "percentages from 0 to 100" in refused(capsys, *needle, "--depths", "0,120")
    assert "did you mean 'variables'" in refused(capsys, *ruler, "--tasks", "variable")
    assert "of the suites needle and ruler" in refused(capsys, "bench", *common, "--samples", "2")


def test_prompt_beyond_the_context(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = save_tiny(tmp_path / "small", context=128)
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"prompt": "word " * 100}))
    line = refused(capsys, "bench", "--model", str(small), "--data", str(data), "--out", str(tmp_path / "out"))
    assert "500 tokens, the model takes 128" in line


def test_nan_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    line = refused(capsys, "bench", "--model", str(folder), "--out", str(tmp_path / "out"))
    assert "model.norm.weight" in line


def test_interrupt(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenthrift.bench.store import Store

    def interrupt(self: Store, row: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "add", interrupt)
    args = ("--model", model, "--plans", "cache=knorm(budget=40)", "--out", str(tmp_path / "out"))
    code, _, err = call(capsys, "bench", *args)
    assert code == 130
    assert "give the same command again" in err


def test_generate(capsys: pytest.CaptureFixture[str], model: str) -> None:
    args = (
        "generate",
        "--model",
        model,
        "--plan",
        "cache=knorm(budget=8)",
        "--max-new-tokens",
        "4",
        "Once upon a time",
    )
    code, out, _ = call(capsys, *args, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["tokens"] <= 4
    assert found["report"]["stages"]["cache"]["tokens_after"] < found["report"]["stages"]["cache"]["tokens_before"]
    code, out, err = call(capsys, *args)
    assert code == 0
    assert "cache" in err
    assert "the prompt is empty" in refused(capsys, "generate", "--model", model, " ")


def test_generate_with_drafts(capsys: pytest.CaptureFixture[str], model: str) -> None:
    args = ("generate", "--model", model, "--max-new-tokens", "24", "to be or not to be or not to be")
    code, plain, _ = call(capsys, *args)
    assert code == 0
    code, out, err = call(capsys, *args, "--plan", "decode=prompt_lookup(adaptive=False)")
    assert (code, out) == (0, plain) and "\x1b" not in out
    assert "source lookup" in err and "drafted by" not in err
    code, out, _ = call(capsys, *args, "--plan", "decode=prompt_lookup(adaptive=False)", "--json")
    found = json.loads(out)
    assert found["text"] == plain.removesuffix("\n")
    decode = found["report"]["stages"]["decode"]
    assert decode["tallies"]["source"]["lookup"]["tried"] == decode["extra"]["drafted"] > 0


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "methods", "--stage", "cache", "--json")
    assert code == 0
    assert {"snapkv", "knorm", "streaming_llm"} <= {m["name"] for m in json.loads(out)}
    assert "did you mean 'cache'" in refused(capsys, "methods", "--stage", "cachet")


def test_every_command_has_help() -> None:
    for command in ("bench", "compress", "methods", "generate", "models"):
        result = CliRunner().invoke(main.app, [command, "--help"])
        assert result.exit_code == 0
        assert "Usage" in result.output
        if command != "models":
            assert "--json" in result.output


def test_help_and_version_import_no_torch() -> None:
    check = (
        "import sys; from tokenthrift.cli.main import run\n"
        "try: run([sys.argv[1]])\n"
        "except SystemExit: sys.exit(3 if {'torch', 'transformers', 'numpy'} & set(sys.modules) else 0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(tokenthrift.__file__).parents[1])}
    for flag in ("--help", "--version"):
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", check, flag], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert time.monotonic() - start < 10  # under one second on an idle machine
