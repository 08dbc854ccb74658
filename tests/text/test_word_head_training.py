"""The scripts that label words, train the word head and compare it: on tiny models, from end to end."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tokenthrift as tt
from tokenthrift.core.errors import ThriftError
from tokenthrift.models.scoring import Scorer
from tokenthrift.models.word_head import WordHead, load_word_scorer
from tokenthrift.ops.tokens import encode
from tokenthrift.text.spans import words

from .tiny import PROSE, language_model, tokenizer, word_scorer

SCRIPTS = Path(__file__).parents[2] / "training" / "word_head"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def run(name: str, *arguments: Any) -> None:
    module = script(name)
    before, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        module.main()
    finally:
        sys.argv = before


# ---- labels ---------------------------------------------------------------------------------------------------------


def test_labels_are_those_of_texts_from_which_the_word_was_really_removed() -> None:
    scorer, text = Scorer(language_model(2048), tokenizer()), PROSE[:160]
    units, ahead = words(text), 6
    asked = [0, 4, 9, len(units) - 1]
    found = script("labels").judge(scorer, text, units, asked, ahead)
    ids, spans = encode(tokenizer(), [text])[0]
    start = scorer.prefix
    whole = nats([start, *ids])
    assert sum(j.tokens for j in found) == len(ids)
    assert sum(j.own for j in found) == pytest.approx(float(whole.sum()), rel=1e-4)
    assert {i for i, j in enumerate(found) if j.later} == {0, 4, 9}  # nothing follows the last word
    for word in (0, 4, 9):
        mine = [i for i, (_, end) in enumerate(spans) if units[word][0] < end <= units[word][1]]
        a, b = mine[0], mine[-1] + 1
        without = nats([start, *ids[:a], *ids[b:]])[a : a + ahead]
        torch.testing.assert_close(
            torch.tensor(found[word].later), without - whole[b : b + ahead], atol=1e-4, rtol=1e-4
        )
        assert found[word].own == pytest.approx(float(whole[a:b].sum()), rel=1e-4)


@torch.no_grad()
def nats(ids: list[int | None]) -> torch.Tensor:
    """``-ln p`` of all but the first."""
    row = torch.tensor([ids])
    return -language_model(2048)(row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]


def test_passages_are_the_same_for_the_same_seed_and_none_comes_twice(tmp_path: Path) -> None:
    corpus = script("corpus")
    file = tmp_path / "long.txt"
    file.write_text("\n\n".join(f"Paragraph {i} says that {PROSE}" for i in range(30)), encoding="utf-8")
    texts = corpus.from_file(file)
    found = corpus.passages(texts, 8, 600, seed=1)
    assert found == corpus.passages(texts, 8, 600, seed=1) != corpus.passages(texts, 8, 600, seed=2)
    assert len({p.text for p in found}) == len(found) == 8
    assert all(corpus.SHORTEST <= len(p.text) <= 600 for p in found)


def test_documentation_of_installed_packages() -> None:
    found = script("corpus").from_package("pytest")
    assert found[0].source == "pytest/description"
    assert all(len(text.text) >= script("corpus").SHORTEST for text in found[1:])
    with pytest.raises(ThriftError, match="not installed"):
        script("corpus").from_package("no-such-package-at-all")


# ---- training -------------------------------------------------------------------------------------------------------


def test_a_head_learns_what_can_be_learned() -> None:
    fitting, judge = script("fit"), word_scorer()
    draw = random.Random(0)
    rows = []
    for _ in range(24):
        text = " ".join(draw.choice(("12", "7 305", "and", "the", "or")) for _ in range(30))
        mine = [text[a:b].strip().isdigit() for a, b in words(text)]
        rows.append({"text": text, "words": [[1, 4.0 if digit else 0.5, [1.0 - digit] * 16] for digit in mine]})
    found = fitting.examples(rows, judge)
    torch.manual_seed(0)
    head = WordHead(16, (0, 2), width=8)
    fitted = fitting.fit(head, found[6:], found[:6], epochs=12, lr=2e-2, seed=0)
    assert fitted.losses[fitted.best] == min(fitted.losses) < 0.3 * fitted.losses[0]
    told = head(found[0].states, found[0].features)
    digits = found[0].costs[:, 0] > 2
    assert told[digits, 0].min() > told[~digits, 0].max()
    assert told[digits, 1].max() < told[~digits, 1].min()
    assert (fitted.words, fitted.removed) == (sum(len(r["words"]) for r in rows[6:]),) * 2


def test_lines_that_hold_no_labels(tmp_path: Path) -> None:
    fitting, file = script("fit"), tmp_path / "labels.jsonl"
    with pytest.raises(ThriftError, match="make labels with"):
        fitting.read_labels(file)
    good = json.dumps({"text": "one two", "words": [[1, 1.0, []], [1, 1.0, []]]})
    file.write_text(good + '\n{"text": "one two", "words": []}\n', encoding="utf-8")
    with pytest.raises(ThriftError, match=r"labels\.jsonl, line 2 holds no labels"):
        fitting.read_labels(file)


def test_labels_resume_and_become_a_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = word_scorer()
    models = {"smollm2-135m": (language_model(2048), tokenizer()), "minilm-l6": (judge.encoder, judge.tokenizer)}
    monkeypatch.setattr(tt, "load", models.__getitem__)
    monkeypatch.setattr("tokenthrift.models.pairs._load", models.__getitem__)
    text, out = tmp_path / "notes.txt", tmp_path / "labels.jsonl"
    text.write_text("\n\n".join(f"Note {i}: {PROSE}" for i in range(20)), encoding="utf-8")
    arguments = ("--out", out, "--files", text, "--count", 4, "--chars", 500, "--asked", 3, "--ahead", 14)
    run("make_labels", *arguments)
    made = out.read_text(encoding="utf-8")
    assert len(made.splitlines()) == 4
    out.write_text("".join(made.splitlines(keepends=True)[:2]), encoding="utf-8")
    run("make_labels", *arguments)
    assert out.read_text(encoding="utf-8") == made
    run("train", "--labels", out, "--out", tmp_path / "head", "--layers", 0, 2, "--width", 4, "--epochs", 2)
    card = json.loads((tmp_path / "head" / "card.json").read_text(encoding="utf-8"))
    assert (card["passages"], card["head"]["layers"]) == (4, [0, 2])
    assert card["words"] > card["removed"] > 0
    assert all(worth >= 0 for worth, _ in load_word_scorer(str(tmp_path / "head")).worth(PROSE, words(PROSE)))


# ---- comparison -----------------------------------------------------------------------------------------------------


def test_answers_stand_once_in_the_passage_as_whole_words() -> None:
    compare = script("compare")
    text = PROSE + "Ana saw the porter again."
    found = compare.answers(text, 50, random.Random(0))
    assert {"1998", "14", "2011"} <= set(found["number"])
    assert "Rua Nova" in found["name"]
    assert "porter" not in found["word"]  # twice
    assert "answer" in found["word"]
    assert all(compare.has(text, answer, 1) for group in found.values() for answer in group)
    assert not compare.has("the answers", "answer")
    assert compare.has("Rua\n  Nova", "rua nova")


def test_the_table_compares_the_same_passages() -> None:
    compare = script("compare")
    rows = [
        {
            "passage": p,
            "plan": plan,
            "rate": 0.5,
            "kept": 0.5,
            "kl": p + more,
            "nats": 0.0,
            "answers": {"word": [True, hit]},
        }
        for plan, more, hit in (("a", 0.0, True), ("b", 0.25, False))
        for p in range(3)
    ]
    rows.append({"passage": 3, "plan": "a", "rate": 0.5, "kept": 0.5, "answers": {"word": [True]}})
    shown = compare.table(rows, ["a", "b"], [0.5])
    assert "| `b` | 0.500 | 1.250 | +0.250 (+0.25…+0.25) |" in shown
    assert shown.splitlines()[2].count("100.0%") == 2
    assert shown.splitlines()[3].count("50.0%") == 2
