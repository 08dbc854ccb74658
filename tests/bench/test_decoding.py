"""The shipped prompts, the exact plans, and the script that compares them, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest

from tokenthrift.bench.decoding import KINDS, all_prompts, exact_plans, load_prompts
from tokenthrift.core.errors import ThriftError

from .tiny import tiny_model, tiny_tokenizer


def test_there_are_enough_prompts_of_every_kind_with_their_source() -> None:
    prompts = all_prompts()
    assert set(Counter(p.kind for p in prompts)) == set(KINDS)
    assert min(Counter(p.kind for p in prompts).values()) >= 34 and len(prompts) >= 204
    assert len({p.id for p in prompts}) == len({p.prompt for p in prompts}) == len(prompts)
    licences = files("tokenthrift").joinpath("data/prompts/README.md").read_text(encoding="utf-8")
    named = ("written for Tokenthrift", "Python 3.11", "Apache License 2.0", "CC0 1.0 legal code", "README", "CONTRIB")
    for p in prompts:
        assert p.source.startswith(named), p.source
        if p.kind in ("summarise", "edit", "qa"):  # a passage and a request
            assert 90 < len(re.findall(r"\w+|[^\w\s]", p.prompt)) < 700, p.id
    assert all(name in licences for name in named[:5])


def test_no_two_prompts_are_near_duplicates() -> None:
    def grams(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return set(zip(*(words[i:] for i in range(5)), strict=False))

    seen = {p.id: grams(p.prompt) for p in all_prompts()}
    for (a, x), (b, y) in combinations(seen.items(), 2):
        assert len(x & y) <= 0.4 * min(len(x), len(y)) or min(len(x), len(y)) < 3, (a, b)


def test_a_few_prompts_are_spread_over_their_kind_and_kinds_take_turns() -> None:
    few = load_prompts(3)
    assert [p.kind for p in few] == [*KINDS] * 3
    assert [p.id for p in few if p.kind == "edit"] == ["edit-01", "edit-13", "edit-25"]
    assert sorted(p.id for p in load_prompts()) == sorted(p.id for p in all_prompts())
    assert {p.kind for p in load_prompts(2, ("qa",))} == {"qa"}
    with pytest.raises(ThriftError, match="did you mean 'edit'"):
        load_prompts(1, ("edits",))
    with pytest.raises(ThriftError, match="at least 1"):
        load_prompts(0)


def test_exact_plans_are_those_that_change_nothing_and_need_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenthrift.bench import decoding
    from tokenthrift.core.method import MethodInfo

    class Lossy:
        """Take what is likely. **Lossy**.

        Args:
            x: one.
        """

    class Sometimes:
        """Draft.

        Lossy only with ``rule="typical"``.
        """

    class Needy:
        """Draft with a model."""

        def __init__(self) -> None:
            raise ThriftError("needy needs a model")

    monkeypatch.setattr(
        decoding.MethodInfo, "make", lambda self, **params: self.cls(**params)
    )  # these are no dataclasses
    found = [MethodInfo(c.__name__.lower(), "decode", "", None, (), "checked", c) for c in (Lossy, Sometimes, Needy)]
    monkeypatch.setattr(decoding, "methods", lambda stage: found)
    assert exact_plans() == ["decode=sometimes()"]


def test_the_plans_here() -> None:
    assert {"decode=prompt_lookup()", "decode=token_recycling()"} <= set(exact_plans())


# ---- benchmarks/decode_methods.py -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "decode_methods.py"
    spec = importlib.util.spec_from_file_location("decode_methods", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(8192).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> str:
    monkeypatch.setattr(sys, "argv", ["decode_methods.py", "--new-tokens", "8", *args])
    script.main()
    return capsys.readouterr().out


def test_the_script_compares_and_goes_on_where_it_stopped(
    script: ModuleType, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    args = ("--model", model, "--kinds", "chat", "maths", "--out", str(out), "--prompts-per-kind", "1")
    shown = run(script, capsys, monkeypatch, *args, "--plans", "decode=prompt_lookup(adaptive=False)", "--details")
    assert "| plain | 1.00 | 1.00 | 1.00 | 1.00 | 100.00% |" in shown
    [row] = [line for line in shown.splitlines() if line.startswith("| `decode=prompt_lookup(adaptive=False)` |")][:1]
    assert row.endswith("| 100.00% |")
    assert "| transformers prompt_lookup |" in shown and shown.count("| chat-01 |") == 2
    first = out.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["ids"] for line in first] == [["chat-01"], ["maths-01"]]

    out.write_text("\n".join([first[0], first[1][:50]]), encoding="utf-8")  # cut off while writing
    shown = run(script, capsys, monkeypatch, *args, "--plans", "decode=prompt_lookup(adaptive=False)", "--cpu")
    assert "# maths-01" in shown and "# chat-01" not in shown and "line 2 was cut off" in shown
    assert [json.loads(line)["ids"] for line in out.read_text(encoding="utf-8").splitlines()[2:]] == [["maths-01"]]
    shown = run(script, capsys, monkeypatch, *args, "--plans", "decode=token_recycling()")
    assert "# chat-01" in shown and "token_recycling" in shown
    out.write_text(first[0] + "\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        run(script, capsys, monkeypatch, *args, "--new-tokens", "9")
    assert "results of other settings" in capsys.readouterr().err


def test_the_script_takes_batches_and_profiles(
    script: ModuleType, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("--model", model, "--kinds", "chat", "--prompts-per-kind", "3", "--plans", "decode=token_recycling()")
    shown = run(script, capsys, monkeypatch, *args, "--batch", "2")
    assert "# chat-01, chat-13" in shown and "# chat-25:" in shown
    assert shown.count("100.00%") == 2 and "transformers prompt_lookup" not in shown
    shown = run(script, capsys, monkeypatch, *args, "--profile")
    assert re.search(r"\| `decode=token_recycling\(\)` \|( [\d.]+ \| [\d.]+ \| [\d.]+% \|?){1}", shown)
    assert "| plain |" in shown
    assert "cumulative" not in shown
    assert "function calls" in run(script, capsys, monkeypatch, *args, "--profile", "--details")


def test_the_script_drafts_with_the_first_layers(
    script: ModuleType,
    model: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ("--model", model, "--kinds", "chat", "--prompts-per-kind", "1", "--new-tokens", "6", "--only-plans")
    shown = run(script, capsys, monkeypatch, *args, "--draft-layers", "1", "--plans", "decode=prompt_lookup()")
    for name in ("draft_model", "dyspec", "rsd", "spectr", "sequoia"):
        assert re.search(rf"\| `decode={name}\(.*first-1.*100.00% \|", shown)
    assert "plain, onednn" not in shown


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--plans", "cache=knorm(budget=8)"), "has no decode stage"),
        (("--plans", "decode=prompt_lokup()"), "did you mean 'prompt_lookup'"),
        (("--prompts-per-kind", "0"), "at least 1 prompt"),
        (("--kinds", "chats"), "did you mean 'chat'"),
    ],
)
def test_mistakes_are_told_in_a_line(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: tuple[str], said: str
) -> None:
    with pytest.raises(SystemExit):
        run(script, capsys, monkeypatch, *args)
    assert said in capsys.readouterr().err


def test_a_wrong_token_shows(script: ModuleType) -> None:
    assert script.equal_share([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == 0.75
    assert script.equal_share([[1, 2]], [[1, 2, 3, 4]]) == script.equal_share([[1, 2, 3, 4]], [[1, 2]]) == 0.5
