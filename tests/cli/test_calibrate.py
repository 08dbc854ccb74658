"""`tokenthrift calibrate` on a tiny model, and mistakes as ThriftError."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import tokenthrift as tt
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


def test_a_method_is_calibrated_for_a_model_and_runs_with_the_file(folder, tmp_path):
    out = tmp_path / "heads.json"
    call = ["razor_attention", "--model", str(folder), "--out", str(out), "--set", "block=20", "--set", "seed=3"]
    shown = CliRunner().invoke(app, [*call, "--json"])
    assert shown.exit_code == 0, shown.exception
    said = json.loads(shown.stdout)
    assert said["file"] == str(out) and said["method"] == "razor_attention" and said["model"]["type"] == "llama"
    assert json.loads(out.read_text())["data"]["block"] == 20
    with tt.apply(f"razor_attention(heads={str(out)!r})", tt.load(folder)[0]):
        pass
    assert str(out) in CliRunner().invoke(app, call).stdout


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (["razor_atention"], "did you mean"),
        (["knorm"], "needs no calibration"),
        (["razor_attention", "--set", "block"], "write NAME=VALUE with block, repeats, seed"),
        (["razor_attention", "--set", "rows=2"], "none of razor_attention's options"),
        (["razor_attention", "--set", "block=many"], "write a number"),
        (["razor_attention", "--set", "block=2.5"], "whole number as block"),
        (["razor_attention", "--set", "block=1"], "cannot be read"),
        (["razor_attention", "--out", "none/heads.json"], "there is no folder"),
    ],
)
def test_mistakes_in_calibrating_a_method(folder, call, said):
    with pytest.raises(ThriftError, match=said):
        CliRunner().invoke(app, [*call, "--model", str(folder)], catch_exceptions=False)


@pytest.mark.parametrize("name", ["fasa", "tca_attention"])
def test_options_of_a_text_that_the_model_writes(folder, tmp_path, name):
    out = tmp_path / "found.json"
    call = [name, "--model", str(folder), "--out", str(out), "--set", "tokens=40", "--set", "queries=5"]
    more = {"fasa": "top=9", "tca_attention": "steps=4"}[name]
    shown = CliRunner().invoke(app, [*call, "--set", more, "--json"])
    assert shown.exit_code == 0, shown.exception
    data = json.loads(out.read_text())["data"]
    assert (data["tokens"], data["queries"], f"{more[:-2]}={data[more[:-2]]}") == (40, 5, more)
    with tt.apply(f"{name}({'chunks' if name == 'fasa' else 'heads'}={str(out)!r})", tt.load(folder)[0]):
        pass


def test_help_says_what_can_be_set():
    assert "razor_attention" in CliRunner().invoke(app, ["--help"]).stdout
    shown = CliRunner().invoke(app, ["razor_attention", "--help"]).stdout
    assert "block, repeats, seed" in " ".join(shown.split())
