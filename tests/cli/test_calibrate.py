"""`tokenthrift calibrate vocabulary` on a tiny model, and mistakes as ThriftError."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from decoding.conftest import build
from decoding.draft_models import WORDS, tokenizer
from tokenthrift.cli.calibrate import app
from tokenthrift.core.errors import ThriftError
from tokenthrift.decoding.vocab_trim import TokenCounts


@pytest.fixture
def folder(tmp_path):
    where = tmp_path / "model"
    build("llama").save_pretrained(where)
    tokenizer(WORDS).save_pretrained(where)
    return where


def test_counts_are_written(folder, tmp_path):
    data, out = tmp_path / "prompts.jsonl", tmp_path / "counts.json"
    data.write_text('{"prompt": "word3 word4 word5"}\n{"prompt": "word9"}\n')
    call = ["vocabulary", "--data", str(data), "--model", str(folder), "--out", str(out), "--max-new-tokens", "7"]
    shown = CliRunner().invoke(app, [*call, "--json"])
    assert shown.exit_code == 0
    counts = TokenCounts.load(out)
    said = json.loads(shown.stdout)
    assert said == {"file": str(out), "tokens": 14, "seen": len(counts.counts), "vocabulary": 24}
    assert "seen in 14" in CliRunner().invoke(app, call).stdout


def test_mistakes_are_told_in_one_line(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("word3 word4")
    call = ["vocabulary", "--data", str(text), "--model", str(folder), "--out", str(tmp_path / "none" / "counts.json")]
    with pytest.raises(ThriftError, match="there is no folder"):
        CliRunner().invoke(app, call, catch_exceptions=False)
    with pytest.raises(ThriftError, match="there is no file"):
        CliRunner().invoke(app, ["vocabulary", "--data", str(tmp_path / "no.txt")], catch_exceptions=False)
    assert "--json" in CliRunner().invoke(app, ["vocabulary", "--help"]).stdout
