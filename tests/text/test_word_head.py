"""The word head: what it reads, what it chooses, and the head that comes with the library."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenthrift as tt
from tokenthrift.core.errors import ThriftError
from tokenthrift.core.plan import Plan
from tokenthrift.models.word_head import (
    CARD,
    FEATURES,
    WEIGHTS,
    WordHead,
    WordScorer,
    load_word_scorer,
    save_word_head,
    surface,
)
from tokenthrift.text.runtime import compress_text
from tokenthrift.text.spans import words
from tokenthrift.text.word_head import WordHeadMethod, spread

from .tiny import PROSE, scorer, tokenizer, word_scorer

SHIPPED = Path(str(files("tokenthrift").joinpath("data/word_head")))


# ---- what the head reads --------------------------------------------------------------------------------------------


def test_a_word_has_the_mean_of_the_states_of_its_own_tokens() -> None:
    judge, text = word_scorer(), "Nobody remembers the answer."
    units = words(text)
    ids = tokenizer()(text)["input_ids"]
    spans = tokenizer()(text, return_offsets_mapping=True)["offset_mapping"]
    with torch.no_grad():
        hidden = judge.encoder(torch.tensor([ids]), output_hidden_states=True).hidden_states
    states, counts = judge.states(text, units)
    assert int(counts.sum()) == len(ids)
    for unit, (start, end) in enumerate(units):
        mine = [i for i, (_, stop) in enumerate(spans) if start < stop <= end]
        expected = torch.stack([hidden[layer][0, mine].mean(0) for layer in (0, 2)])
        torch.testing.assert_close(states[unit], expected)


def test_long_texts_are_read_in_chunks_whose_order_and_padding_do_not_matter() -> None:
    judge = word_scorer()
    text = "The rent was paid. " * 3 + PROSE + "He asked. " * 40
    units = words(text)
    states, _ = judge.states(text, units)
    small = WordScorer(judge.encoder, judge.tokenizer, judge.head, window=judge.window)
    assert not states.isnan().any()
    torch.testing.assert_close(small.states(text, units)[0], states)
    first = next(i for i, (_, end) in enumerate(units) if end > text.index("He asked"))
    alone, _ = judge.states(text[: units[first - 1][1]], units[:first])
    torch.testing.assert_close(states[: first - 40], alone[: first - 40])  # the chunk at the edge differs


def test_surface_features_see_what_was_said_before_and_what_comes_again() -> None:
    text = "Ana paid 12 euros.\nana paid!"
    units = words(text)
    rows = surface(text, units)
    assert rows.shape == (len(units), FEATURES)
    named = {text[a:b].strip() + f"@{a}": row for (a, b), row in zip(units, rows.tolist(), strict=True)}
    first, second, number = named["Ana@0"], named["ana@18"], named["12@8"]
    assert (first[3], second[3]) == (1, 0)  # a capital
    assert (number[1], number[2], first[1]) == (1, 1, 0)
    assert (first[12], second[12]) == (0, pytest.approx(math.log(2)))  # said before
    assert (first[13], second[13]) == (pytest.approx(math.log(2)), 0)  # comes again
    assert named["paid@22"][14] == pytest.approx(math.log(2))  # behind the same word as before
    assert (second[8], first[8]) == (1, 0)  # begins a line


def test_worth_is_the_weighted_sum_of_both_costs_and_never_negative() -> None:
    head = WordHead(4, (0,), width=2, later=0.5)
    costs = torch.tensor([[2.0, 3.0], [-1.0, 4.0], [-1.0, -1.0]])
    assert head.worth(costs).tolist() == [3.5, 2.0, 0.0]


def test_nothing_has_no_worth() -> None:
    assert word_scorer().worth("", []) == []


# ---- what the method keeps ------------------------------------------------------------------------------------------


def test_the_words_of_most_worth_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = word_scorer()
    liked = {"Lisbon", "porter", "answer"}
    monkeypatch.setattr(judge, "worth", lambda text, units: [(float(text[a:b].strip() in liked), 1) for a, b in units])
    out = compress_text(
        [WordHeadMethod(rate=0.2, level="word", smooth=0, tail=0, model=judge)], PROSE, None, tokenizer()
    )
    assert liked <= set(out.text.replace(".", " ").split())


def test_a_phrase_is_worth_the_mean_over_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    judge, text = word_scorer(), "the old roof fell"
    worth = [(1.0, 1), (2.0, 3), (4.0, 1), (9.0, 2)]
    monkeypatch.setattr(judge, "worth", lambda *_: worth)
    method = WordHeadMethod(level="phrase", smooth=0, model=judge)
    assert method.of_units(text, [(0, 12), (12, 17)], judge) == [pytest.approx(11 / 5), 9.0]
    monkeypatch.setattr(judge, "worth", lambda *_: [*worth[:3], (0.0, 0)])
    assert method.of_units(text, [(0, 12), (12, 17)], judge) == [pytest.approx(11 / 5), float("inf")]


def test_worth_is_spread_over_the_words_around(monkeypatch: pytest.MonkeyPatch) -> None:
    judge, text = word_scorer(), " ".join(["word"] * 30)
    units = words(text)
    monkeypatch.setattr(judge, "worth", lambda *_: [(float(i == 15), 1) for i in range(30)])
    sharp = WordHeadMethod(smooth=0, model=judge).of_units(text, units, judge)
    assert sharp == [float(i == 15) for i in range(30)]
    soft = WordHeadMethod(smooth=2, model=judge).of_units(text, units, judge)
    assert soft[13] / soft[15] == pytest.approx(math.exp(-0.5))
    assert soft.index(max(soft)) == 15
    monkeypatch.setattr(judge, "worth", lambda *_: [(3.0, 2)] * 30)
    assert WordHeadMethod(model=judge).of_units(text, units, judge) == [pytest.approx(3.0)] * 30, "at the ends too"


@pytest.mark.parametrize("smooth", [-1, math.nan, math.inf])
def test_no_such_spread(smooth: float) -> None:
    with pytest.raises(ThriftError, match="is no number of words"):
        WordHeadMethod(smooth=smooth)


def test_spreading_over_more_words_than_there_are() -> None:
    first, second = spread(np.array([1.0, 2.0]), 100.0)
    assert first == pytest.approx(second, rel=1e-3)
    assert spread(np.zeros(0), 5.0).tolist() == []


def test_the_tail_is_a_share_of_the_budget_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = word_scorer()
    text = " ".join(["word"] * 100)
    monkeypatch.setattr(judge, "worth", lambda text, units: [(float(-i), 1) for i in range(len(units))])
    kept = {}
    for tail in (0, 0.2, 1):
        method = WordHeadMethod(rate=0.4, level="word", smooth=0, tail=tail, model=judge)
        kept[tail] = compress_text([method], text, None, tokenizer()).kept
    assert [a for a, _ in kept[0]] == [0]  # the first are worth most
    start, end = kept[0.2][-1]
    assert end == len(text)
    assert (end - start) / sum(b - a for a, b in kept[0.2]) == pytest.approx(0.2, abs=0.03)
    assert kept[1][-1][0] == len(text) - 24 * len(" word")  # no more than so many units, whatever the share


def test_no_model_is_asked_where_all_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = word_scorer()
    monkeypatch.setattr(judge, "worth", lambda *_: pytest.fail("asked"))
    assert compress_text([WordHeadMethod(rate=1.0, model=judge)], PROSE, None, tokenizer()).text == PROSE


@pytest.mark.parametrize("bad", [3, "", ("a", "b")])
def test_models_that_are_none(bad: object) -> None:
    with pytest.raises(ThriftError, match="word_head takes model as the folder of a trained head"):
        WordHeadMethod(model=bad)


def test_it_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenthrift.text.word_head.load_word_scorer", lambda folder: word_scorer())
    assert tt.compress(PROSE, scorer=scorer()).method == "text=word_head()"
    chat = [{"role": "user", "content": PROSE}, {"role": "user", "content": "And?"}]
    [shorter] = tt.compress_messages(chat, rate=0.4, scorer=scorer()).texts.values()
    assert shorter.method.startswith("text=word_head(rate=")


# ---- folders --------------------------------------------------------------------------------------------------------


def test_a_head_that_is_written_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = word_scorer()
    monkeypatch.setattr("tokenthrift.models.pairs._load", lambda name: (judge.encoder, judge.tokenizer))
    save_word_head(judge.head, tmp_path, {"encoder": "tiny"})
    units = words(PROSE)
    again = load_word_scorer(str(tmp_path))
    for (read, tokens), (worth, same) in zip(again.worth(PROSE, units), judge.worth(PROSE, units), strict=True):
        assert read == pytest.approx(worth, abs=0.02)  # float16
        assert tokens == same
    out = compress_text(
        Plan.parse(f"text=word_head(rate=0.4, model='{tmp_path}')").at("text"), PROSE, None, tokenizer()
    )
    assert out.tokens_after <= 0.4 * out.tokens_before + 1


def test_folders_without_a_head_or_with_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(ThriftError, match=r"has no card\.json: give a folder that training made"):
        load_word_scorer(str(tmp_path / "nothing"))
    save_word_head(word_scorer().head, tmp_path, {"encoder": "tiny"})
    (tmp_path / WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(ThriftError, match=r"cannot be read .* train or install it again"):
        load_word_scorer(str(tmp_path))


def test_another_encoder_than_the_heads_own_is_refused() -> None:
    judge = word_scorer()
    for head in (WordHead(32, (0,)), WordHead(16, (0, 9))):
        with pytest.raises(ThriftError, match="give its own encoder"):
            WordScorer(judge.encoder, judge.tokenizer, head)


# ---- the head that is shipped ---------------------------------------------------------------------------------------


def test_the_shipped_head_is_small_whole_and_described() -> None:
    card = json.loads((SHIPPED / CARD).read_text(encoding="utf-8"))
    assert (SHIPPED / WEIGHTS).stat().st_size < 2 * 2**20
    assert card["encoder"] == "minilm-l6"
    assert card["words"] > card["removed"] > 0
    head = WordHead(**card["head"])
    from safetensors.torch import load_file

    stored = load_file(SHIPPED / WEIGHTS)
    assert set(stored) == set(head.state_dict())
    assert all(value.isfinite().all() for value in stored.values())


@pytest.mark.packs
def test_the_shipped_head_tells_what_matters_from_what_does_not() -> None:
    text = (
        "The meeting of the board was moved to the harbour office in Valparaiso, because the roof of the old building "
        "was leaking again. It was agreed that the invoices of the supplier Kowalski should be paid by Thursday."
    )
    counts = tt.load("minilm-l6")[1]
    out = tt.compress(text, "word_head", rate=0.4, tokenizer=counts, protect="none", level="word", smooth=0, tail=0)
    kept = set(out.text.split())
    assert {"Valparaiso", "invoices", "supplier", "leaking"} <= kept
    assert not kept & {"of", "the", "was", "that", "to", ",", "."}
    again = tt.compress([text, text], "word_head", rate=0.4, tokenizer=counts, protect="none", tail=0.3)
    assert again[0].kept == again[1].kept
    assert again[0].text.endswith("Thursday.")  # the tail


@pytest.mark.packs
def test_the_shipped_head_reads_languages_without_spaces_and_long_texts() -> None:
    counts = tt.load("minilm-l6")[1]
    text = (
        "東京は日本の首都です。人口は約1400万人で、世界最大の都市圏を形成しています。"
        + "The rent was paid late. " * 200
    )
    out = tt.compress(text, rate=0.3, tokenizer=counts)
    assert 0.29 * out.tokens_before < out.tokens_after <= 0.3 * out.tokens_before + 1
    assert "1400万人" in out.text
