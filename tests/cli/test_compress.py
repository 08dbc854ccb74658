"""`tokenthrift compress`: files and pipes, text, JSON and HTML, and mistakes as ThriftError."""

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
from tokenthrift.models.scoring import Scorer

from ..text.tiny import PROSE, language_model, tokenizer

app = typer.Typer()
app.command()(compress)


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "load_scorer", lambda name: Scorer(language_model(), tokenizer()))


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    file = tmp_path / "prose.txt"
    file.write_text(PROSE, encoding="utf-8")
    return file


def run(*arguments: Any, stdin: str | bytes | None = None) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    if isinstance(result.exception, ThriftError):
        raise result.exception
    return result


def test_a_file(prose: Path) -> None:
    shown = run(prose, "--method", "truncate", "--rate", 0.3, "--protect", "none")
    assert shown.exit_code == 0
    assert PROSE.startswith(shown.stdout.removesuffix("\n"))
    assert "tokens (" in shown.stderr
    assert "text=truncate(rate=0.3)" in shown.stderr


def test_a_pipe_at_rate_1_is_passed_through() -> None:
    for arguments in ((), ("-",)):
        assert run(*arguments, "--rate", 1, stdin=PROSE).stdout == PROSE


def test_json_and_parameters(prose: Path) -> None:
    shown = json.loads(run(prose, "--param", "level=sentence", "--param", "context=document", "--json").stdout)
    assert shown["method"] == "text=selective_context(level='sentence', context='document')"
    assert shown["text"] == "".join(PROSE[a:b] for a, b in shown["kept"])
    assert shown["rate"] == shown["tokens_after"] / shown["tokens_before"] <= 0.5


def test_output_files(prose: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "out.txt", tmp_path / "page.html"
    shown = run(prose, "--method", "truncate", "--protect", "none", "--out", out, "--html", page)
    assert shown.stdout == ""
    assert PROSE.startswith(out.read_text(encoding="utf-8"))
    assert "<del>" in page.read_text(encoding="utf-8")


def test_help_names_the_options() -> None:
    shown = run("--help").stdout
    assert all(
        option in shown for option in ("--method", "--rate", "--question", "--param", "--json", "--out", "--html")
    )


@pytest.mark.parametrize(
    ("data", "arguments", "said"),
    [
        (b"", (), "prose.txt is empty"),
        (b"a\0b", (), "prose.txt is binary"),
        (b"\xff\xfe\xfa", (), "prose.txt is not UTF-8 text"),
        (b"text", ("--method", "lingua"), "unknown method 'lingua' at stage text"),
        (b"text", ("--method", "truncate", "--rate", "1.5"), "keep ratio 1.5 is outside"),
        (b"text", ("--rate", "0"), "keep ratio 0.0 is outside"),
        (b"text", ("--method", "bm25_sentences"), "give one with question=... .--question."),
        (b"text", ("--method", "exit", "--question", "Who?", "--param", "threshold=2"), "is no probability"),
        (b"text", ("--rate", "nan"), "nan"),
        (b"text", ("--param", "level"), "write --param key=value"),
        (b"text", ("--param", "levl=token"), "did you mean 'level'"),
        (b"text", ("--method", "truncate", "--out", "/nowhere/at/all.txt"), "cannot write"),
    ],
)
def test_mistakes(prose: Path, data: bytes, arguments: tuple[str, ...], said: str) -> None:
    prose.write_bytes(data)
    with pytest.raises(ThriftError, match=said) as error:
        run(prose, *arguments)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ThriftError, match="there is no file"):
        run(tmp_path / "none.txt")
    with pytest.raises(ThriftError, match="is a folder"):
        run(tmp_path)
    with pytest.raises(ThriftError, match="standard input is empty"):
        run("-", stdin="")


def test_help_loads_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, tokenthrift.cli.compress; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
