"""`tokenthrift models`: text and JSON, help, and mistakes as ThriftError (the top level makes one line of them)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tokenthrift.cli.models import app
from tokenthrift.core.errors import ThriftError
from tokenthrift.models.packs import PACKS


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENTHRIFT_CACHE", str(tmp_path))


def test_list(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["list"])
    assert shown.exit_code == 0
    assert all(name in shown.stdout for name in PACKS)
    assert shown.stdout.count("not pulled yet") == len(PACKS)
    listed = json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)
    assert listed["cache"] == str(tmp_path)
    assert {pack["name"]: pack["cached"] for pack in listed["packs"]} == dict.fromkeys(PACKS, False)


@pytest.mark.parametrize("command", ["list", "pull", "path"])
def test_help(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0
    assert "--json" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["path", "minilm-l6"], "models pull minilm-l6"),
        (["path", "thrift-vlm"], "models pull thrift-vlm"),
        (["path", "minilm"], "did you mean 'minilm-l6'"),
        (["pull", "dino", "--json"], "did you mean 'dinov2-s'"),
        (["pull", "dinov2-s", "--source", "web"], "unknown pack source 'web'"),
    ],
)
def test_mistakes(arguments: list[str], said: str) -> None:
    caught = CliRunner().invoke(app, arguments).exception
    assert isinstance(caught, ThriftError)
    assert said in str(caught)
    assert "\n" not in str(caught)
