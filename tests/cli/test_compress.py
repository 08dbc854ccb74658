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
from tokenthrift.text import word_head

from ..text.tiny import PROSE, language_model, tokenizer, word_scorer

app = typer.Typer()
app.command()(compress)


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "load_scorer", lambda name: Scorer(language_model(), tokenizer()))
    monkeypatch.setattr(word_head, "load_word_scorer", lambda folder: word_scorer())


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
    shown = json.loads(run(prose, "--param", "level=word", "--param", "tail=0.2", "--json").stdout)
    assert shown["method"] == "text=word_head(level='word', tail=0.2)"
    assert shown["text"] == "".join(PROSE[a:b] for a, b in shown["kept"])
    assert shown["rate"] == shown["tokens_after"] / shown["tokens_before"] < 0.51


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


def test_targets_and_protection(prose: Path) -> None:
    shown = json.loads(run(prose, "--tokens", 80, "--protect", "url", "--json").stdout)
    assert 75 <= shown["tokens_after"] <= 80
    assert "https://example.org/a?b=1" in shown["text"]
    assert shown["notes"] == [] and 0 < shown["predicted_loss"] < 1
    spent = json.loads(run(prose, "--spend", 0.0002, "--price", 2.5, "--protect", "none", "--json").stdout)
    assert 75 <= spent["tokens_after"] <= 80


def test_notes_are_told(prose: Path) -> None:
    shown = run(prose, "--min-saving", "0.9")
    assert shown.stdout == PROSE
    assert "note: at most" in shown.stderr
    assert "note: the predicted loss" in run(prose, "--max-loss", "0.01").stderr
    assert run(prose, "--min-saving", "5", "--chunk", "60").stdout != PROSE


def test_messages(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": PROSE}, {"role": "tool", "content": PROSE}, {"role": "user", "content": "Ü?"}]
    file, out = tmp_path / "chat.json", tmp_path / "out.json"
    file.write_text(json.dumps({"model": "m", "messages": chat}), encoding="utf-8")
    run(file, "--messages", "--rate", 0.5, "--append-only", "--out", out)
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["model"] == "m"
    assert [m == n for m, n in zip(chat, written["messages"], strict=True)] == [True, False, True]
    file.write_text(json.dumps(chat), encoding="utf-8")
    assert json.loads(run(file, "--messages", "--rate", 0.5).stdout) == written["messages"]
    named = json.loads(run(file, "--messages", "--roles", "system", "--json").stdout)
    assert [text["message"] for text in named["texts"]] == [0]


def test_another_tokenizer_needs_no_model(prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(name: str) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(api, "load_scorer", never)
    monkeypatch.setattr(api, "load_tokenizer", lambda name: tokenizer())
    shown = run(prose, "--method", "truncate", "--rate", 0.5, "--tokenizer", "tiktoken:o200k_base")
    assert "text=truncate()" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tokens", "0"), "no number of tokens"),
        (("--tokens", "9", "--rate", "0.5"), "two targets"),
        (("--spend", "1"), "needs both"),
        (("--protect", "jsn"), "did you mean 'json'"),
        (("--min-saving", "much"), "--min-saving much is no number"),
        (("--min-saving", "-3"), "no saving"),
        (("--max-loss", "nan"), "outside"),
        (("--chunk", "0"), "no number of tokens"),
        (("--append-only",), "add --messages"),
        (("--messages",), "--messages needs JSON"),
        (("--messages", "--html", "x.html"), "--html shows one text"),
    ],
)
def test_more_mistakes(prose: Path, arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ThriftError, match=said) as error:
        run(prose, *arguments)
    assert "\n" not in str(error.value)
