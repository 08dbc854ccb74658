"""Needle grids and RULER-like tasks: what is generated, how it is scored, resumed, shown and refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tokenthrift.bench.data import Data, Document, default_data
from tokenthrift.bench.grids import Grid, grids, markdown, overview
from tokenthrift.bench.haystack import bury, fit
from tokenthrift.bench.language import LanguageBench
from tokenthrift.bench.metrics import probability, recall
from tokenthrift.bench.needle import NeedleSuite
from tokenthrift.bench.report import heat_map
from tokenthrift.bench.ruler import MEANING, RulerSuite
from tokenthrift.bench.runner import BenchResult, bench
from tokenthrift.bench.store import Store
from tokenthrift.bench.suites import find_suite
from tokenthrift.bench.tasks import SUITES, Case, Probe
from tokenthrift.core.errors import ThriftError
from tokenthrift.core.plan import Plan

from .tiny import a_text, tiny_model, tiny_tokenizer

NEEDLE = NeedleSuite(lengths=(300, 500), depths=(0, 50, 100))
RULER = RulerSuite(lengths=(1500,), samples=1)
SMALL = NeedleSuite(lengths=(250, 350), depths=(0, 50))
FEW = RulerSuite(lengths=(700,), samples=1, tasks=("multi_query", "frequent_words"))
PLANS = ["cache=streaming_llm(budget=40)", "text=truncate(rate=0.5)", "decode=prompt_lookup()"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def merging() -> Any:
    """A tokenizer with merges, and a first token of its own, so that a cut between characters may skip a length."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<s>"], show_progress=False)
    inner.train_from_iterator([document.text for document in default_data().documents[:4]], trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def length_of(case: Case, tokenizer: Any) -> int:
    asked = case.question + case.probes[0].lead
    return len(tokenizer(case.context)["input_ids"]) + len(tokenizer(asked, add_special_tokens=False)["input_ids"])


def asked_length(case: Case) -> int:
    return int(case.cell[1])


# ---- generation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("suite", [NEEDLE, RULER], ids=["needle", "ruler"])
def test_prompts_have_exactly_the_length(suite: Any, later: bool, tokenizer: Any, merging: Any) -> None:
    for tok in (tokenizer, merging):
        cases = replace(suite, question_later=later).cases(default_data(), tok, 0, None)
        assert [length_of(case, tok) for case in cases] == [asked_length(case) for case in cases]
        assert all(bool(case.question) != later for case in cases)


@pytest.mark.parametrize("suite", [NEEDLE, RULER], ids=["needle", "ruler"])
def test_cases_follow_the_seed_and_can_be_answered(suite: Any, tokenizer: Any) -> None:
    suite = replace(suite, samples=2)
    cases = suite.cases(default_data(), tokenizer, 3, 4096)
    assert cases == suite.cases(default_data(), tokenizer, 3, 4096)
    assert len({case.id for case in cases}) == len({case.context for case in cases}) == len(cases)
    other = {case.id: case for case in suite.cases(default_data(), tokenizer, 4, 4096)}
    for case in cases:
        assert other[case.id].context != case.context
        assert other[case.id].expected != case.expected
        [probe] = case.probes
        assert all(string in case.context for string in case.expected)
        assert recall(probe.answer, case.expected) == 1
        assert not any(string in case.question for string in case.expected)
        assert case.new_tokens > len(tokenizer(probe.answer)["input_ids"])


def test_needles_lie_where_they_should(tokenizer: Any) -> None:
    cases = NeedleSuite(lengths=(3000,), depths=(0, 10, 33.3, 50, 100)).cases(default_data(), tokenizer, 0, None)
    texts = set()
    for case in cases:
        sentence = re.search(r"\nThe access code of the \w+ office is \d{7}\.\n", case.context)
        assert sentence
        before, after = case.context[: sentence.start()], case.context[sentence.end() :]
        depth = 100 * len(before) / len(before + after)
        assert depth == pytest.approx(float(case.cell[0].rstrip("%")), abs=2)
        texts.add(before + after)
    assert len({case.expected for case in cases}) == len({case.question for case in cases}) == 1
    assert max(texts, key=len).startswith(min(texts, key=len)[:2500])  # but for its end, one text at all depths


def test_bury_splits_no_sentence() -> None:
    prose = "One two three. Four five six.\nSeven eight nine. Ten."
    assert bury(prose, [(0, "A")]) == f"\nA\n{prose}"
    assert bury(prose, [(100, "A")]) == f"{prose}\nA\n"
    assert bury(prose, [(30, "A"), (31, "B")]) == "One two three. \nA\n\nB\nFour five six.\nSeven eight nine. Ten."


def test_fit_takes_uneven_counts() -> None:
    for count in (lambda n: n, lambda n: n // 7, lambda n: 3 + n // 5 - (n % 11 == 0), lambda n: int(n**0.7)):
        for length in (3, 10, 57, 400):
            size = fit(count, length, 10**6)
            assert size is not None
            assert count(size) == length
    assert fit(lambda n: 2 * n, 9, 100) is None
    assert fit(lambda n: n // 100, 9, 100) is None  # the text is too short


def by_task(tokenizer: Any, length: int = 1500) -> dict[str, Case]:
    cases = replace(RULER, lengths=(length,)).cases(default_data(), tokenizer, 5, None)
    return {case.probes[0].task: case for case in cases}


def test_tasks_are_what_they_say(tokenizer: Any) -> None:
    cases = by_task(tokenizer)
    assert list(cases) == list(MEANING)
    hidden = {name: re.findall(r"access code of the (\w+) office is (\d+)", c.context) for name, c in cases.items()}
    assert [len(hidden[name]) for name in ("single_needle", "multi_key", "multi_value", "multi_query")] == [1, 4, 4, 4]
    assert len(dict(hidden["multi_key"])) == len(dict(hidden["multi_query"])) == 4
    assert len(dict(hidden["multi_value"])) == 1
    for name in ("single_needle", "multi_key"):
        place = re.search(r"code of the (\w+) office\?", cases[name].question)
        assert place
        assert cases[name].expected == (dict(hidden[name])[place[1]],)
    places = re.findall(r"[A-Z][a-z]+", cases["multi_query"].question.split("offices")[1].split("?")[0])
    assert cases["multi_query"].expected == tuple(dict(hidden["multi_query"])[place] for place in places)

    case = cases["key_value"]
    pairs = json.loads(re.sub(r",\n}$", "\n}", case.context[case.context.index("{\n") :]))
    [key] = re.findall(r'the key "(\w+)"', case.question)
    assert len(pairs) > 40
    assert pairs[key] == case.probes[0].answer

    case = cases["variables"]
    values: dict[str, str] = {}
    for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", case.context):
        values[name] = values.get(value, value)  # in the order of the text: each is known when it is used
    [value] = re.findall(r"have the value (\d+)", case.question)
    assert [name for name, found in values.items() if found == value] == list(case.expected)
    assert len(case.expected) == 5


@pytest.mark.parametrize("length", [1500, 4500])
def test_most_frequent_words(tokenizer: Any, length: int) -> None:
    cases = by_task(tokenizer, length)
    listed = Counter(
        re.findall(r"\d+\. (\w+)", cases["common_words"].context[cases["common_words"].context.index("1. ") :])
    )
    (least_common, next_common) = sorted(listed.values(), reverse=True)[9:11]
    assert (least_common, next_common) == ((6, 1) if length < 4096 else (30, 3))
    assert {word for word, _ in listed.most_common(10)} == set(cases["common_words"].expected)

    text = cases["frequent_words"].context
    words = Counter(word for word in text[text.index("....") - 7 :].split() if re.fullmatch(r"[a-z]{6}", word))
    ranked = words.most_common(4)
    assert ranked[2][1] > ranked[3][1]
    assert tuple(word for word, _ in ranked[:3]) == cases["frequent_words"].expected


def test_text_that_is_too_short_is_repeated(tokenizer: Any) -> None:
    data = Data("own", (Document("a", a_text()),))
    [case] = NeedleSuite(lengths=(9000,), depths=(50,)).cases(data, tokenizer, 0, None)
    assert length_of(case, tokenizer) == 9000


# ---- scoring --------------------------------------------------------------------------------------------------------


def test_scores() -> None:
    assert recall("The codes are 12, 34 and AB.", ["12", "34", "ab", "56"]) == 0.75
    logits = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    each = logits.softmax(-1)[[0, 1], [1, 0]]
    assert probability(logits, torch.tensor([1, 0])) == pytest.approx(float(each.prod() ** 0.5))


class Copier(torch.nn.Module):
    """Stands for a model that says what it is told, token by token; it counts its forwards."""

    def __init__(self, says: Sequence[int]) -> None:
        super().__init__()
        self.says, self.forwards = list(says), 0
        self.device = torch.device("cpu")
        self.generation_config = type("Config", (), {"eos_token_id": [256]})()

    def forward(self, ids: torch.Tensor, past_key_values: list[int], logits_to_keep: int = 0) -> Any:
        self.forwards += 1
        past_key_values.append(ids.shape[1])
        return type("Out", (), {"logits": self.logits(len(past_key_values))[None, None]})()

    def logits(self, step: int) -> torch.Tensor:
        return 5.0 * torch.nn.functional.one_hot(torch.tensor(self.says[step]), 260)


def answer(says: str, expected: tuple[str, ...] = ("123", "45"), new_tokens: int = 20) -> tuple[dict[str, Any], Copier]:
    tokenizer = tiny_tokenizer()
    model = Copier([*tokenizer(says)["input_ids"], 256, *[0] * 40])
    runner = object.__new__(LanguageBench)
    runner.model, runner.tokenizer = model, tokenizer
    probe = Probe("multi_value", "", " 123, and 45")
    case = Case("x", "multi_value", "", probes=(probe,), expected=expected, score="recall", new_tokens=new_tokens)
    row, _ = runner._recall([], model.logits(0)[None], case, write=True)
    return row, model


def test_free_answers_are_scored_by_what_they_contain() -> None:
    row, model = answer(" 123, and 45")
    assert (row["recall"], row["hits"], row["scores"]) == (1, 1, [["multi_value", 1.0]])
    assert model.forwards == 11  # the answer but for its last token; nothing is written twice
    row, _ = answer(" 45 and 123 and more")
    assert row["recall"] == 1
    assert row["text"] == " 45 and 123"  # no more than is needed
    assert row["hits"] < 1
    assert answer(" 123, and so on")[0]["recall"] == 0.5
    assert answer(" none")[0]["text"] == " none"  # ended by itself
    assert answer(" it is 123, and 45", new_tokens=6)[0]["text"] == " it is"


@pytest.mark.parametrize("later", [False, True])
def test_teacher_forcing_equals_one_forward(later: bool) -> None:
    runner = LanguageBench(tiny_model(), tiny_tokenizer())
    [case] = NeedleSuite(lengths=(300,), depths=(50,), question_later=later).cases(
        default_data(), runner.tokenizer, 0, 2048
    )
    row = runner.quality(Plan(), case)
    ids = runner._ids(case.context + case.question + case.probes[0].lead + case.probes[0].answer)
    found = runner._ids(case.probes[0].answer)
    with torch.no_grad():
        logits = runner.model(torch.tensor([ids])).logits[0, -len(found) - 1 : -1]
    assert row["probability"] == pytest.approx(probability(logits, torch.tensor(found)), rel=1e-4)
    assert (row["kl"], row["agreement"]) == (0, 1)
    assert row["scores"] == [["needle", row["probability"]]]
    assert row["tokens"] == (300 if not later else 300 - len(runner._ids(case.probes[0].lead)))


def test_writing_equals_generate() -> None:
    runner = LanguageBench(tiny_model(), tiny_tokenizer())
    [case] = NeedleSuite(lengths=(300,), depths=(50,)).cases(default_data(), runner.tokenizer, 0, 2048)
    row = runner.quality(Plan(), case)
    ids = torch.tensor([runner._ids(case.context + case.question)])
    out = runner.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=case.new_tokens, do_sample=False
    )
    written = [token for token in out[0, 300:].tolist() if token != 256]
    assert row["text"] == runner.tokenizer.decode(written)


def test_a_plan_that_keeps_everything_changes_nothing() -> None:
    runner = LanguageBench(tiny_model(), tiny_tokenizer())
    [case] = NeedleSuite(lengths=(300,), depths=(0,)).cases(default_data(), runner.tokenizer, 0, 2048)
    plain, kept, less = (
        runner.quality(Plan.parse(p), case) for p in ("", "cache=snapkv(budget=1.0)", "cache=streaming_llm(budget=20)")
    )
    assert (kept["probability"], kept["text"]) == (plain["probability"], plain["text"])
    assert less["probability"] != plain["probability"]
    assert less["kl"] > 0


# ---- whole runs -----------------------------------------------------------------------------------------------------


def run(out: Path, **changes: Any) -> BenchResult:
    settings: dict[str, Any] = {"plans": PLANS, "suite": SMALL, "progress": False}
    return bench(tiny_model(), out=out, processor=tiny_tokenizer(), **{**settings, **changes})


@pytest.fixture(scope="module")
def needle(tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    return run(tmp_path_factory.mktemp("needle"))


@pytest.fixture(scope="module")
def ruler(tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    return run(tmp_path_factory.mktemp("ruler"), suite=FEW, plans=PLANS[0])


def test_needle_grid(needle: BenchResult) -> None:
    [section] = needle.sections
    plain, streaming, text, decode = section.results
    assert not any(r.error for r in section.results)
    assert set(plain.tasks) == {"needle"}
    assert plain.tasks["needle"].cases == 4
    assert (plain.loss, plain.kl, plain.time_ratio, plain.cost) == (0, 0, 1, 1)
    assert streaming.kv_ratio < 0.2
    assert streaming.cost == pytest.approx((streaming.time_ratio * streaming.kv_ratio) ** 0.5)
    assert text.tokens < 0.8 * text.tokens_before
    assert decode.loss == 0
    first = section.grids[0]
    assert [g.name for g in section.grids] == [r.name for r in section.results]
    assert (first.rows, first.columns) == (["0%", "50%"], ["250", "350"])
    rows = {row["case"]: row for row in needle.rows if not row["plan"]}
    assert first.scores[1] == [rows[f"needle/{n}/50%/0"]["probability"] for n in (250, 350)]
    assert section.grids[3].scores == first.scores  # decode shares the rows
    assert section.grids[1].scores != first.scores
    assert needle.to_dict()["sections"][0]["grids"][0]["rows"] == first.rows
    json.dumps(needle.to_dict(), allow_nan=False)


def test_ruler_tasks(ruler: BenchResult) -> None:
    [section] = ruler.sections
    assert list(section.results[0].tasks) == list(FEW.tasks) == section.grids[0].rows
    assert all(0 <= value <= 1 for grid in section.grids for row in grid.scores for value in row if value is not None)
    assert all(grid.scores is grid.recall for grid in section.grids)
    assert all(p is not None and 0 < p < 1 for grid in section.grids for row in grid.probability for p in row)


@pytest.mark.parametrize("which", ["needle", "ruler"])
def test_report_and_scores(which: str, request: pytest.FixtureRequest) -> None:
    result: BenchResult = request.getfixturevalue(which)
    page = (result.out / "report.html").read_text(encoding="utf-8")
    count = len(result.sections[0].results)
    assert page.count("<figure>") == page.count("<svg") == 2 + count
    assert result.note in page.replace("&#39;", "'")
    assert f"--suite {which} --lengths" in page
    assert not re.search(r"(https?:)?//[a-z0-9-]+\.", page)
    assert not re.search(r"#0(10203|40506|70809)", page)  # no stand-in is left
    text = (result.out / "scores.md").read_text(encoding="utf-8")
    assert text.startswith(result.note)
    assert text.count("\n## ") == count
    for row in result.sections[0].grids[0].rows:
        assert f"| {row} | " in text


def test_the_reports_command_makes_the_same_suite(needle: BenchResult) -> None:
    assert "bench --model LlamaForCausalLM" in needle.command
    assert "--suite needle --lengths 250,350 --depths 0,50 --max" in needle.command
    assert NeedleSuite().flags() == RulerSuite().flags() == []
    assert replace(RulerSuite(), tasks=("variables",), question_later=True).flags() == [
        "--question-later", "--tasks", "variables",
    ]  # fmt: skip


def test_an_interrupted_run_goes_on(needle: BenchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (needle.out / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(lines[:6]))  # in the middle of a case
    add, measured = Store.add, []

    def note(self: Store, row: dict[str, Any]) -> None:
        measured.append(row["key"])
        add(self, row)

    monkeypatch.setattr(Store, "add", note)
    again = run(tmp_path)
    assert measured == [json.loads(line)["key"] for line in lines[6:]]
    for a, b in zip(needle.sections[0].grids, again.sections[0].grids, strict=True):
        assert a == b
    for x, y in zip(needle.sections[0].results, again.sections[0].results, strict=True):
        assert (x.kl, x.loss) == pytest.approx((y.kl, y.loss))
    measured.clear()
    run(tmp_path)
    assert not measured
    with pytest.raises(ThriftError, match=r"different .*suite.*--fresh"):
        run(tmp_path, suite="needle", lengths=[250], depths=[0, 50])


def test_a_failing_plan_has_no_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenthrift.cache.streaming_llm import StreamingLLM

    def fail(self: Any, view: Any) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(StreamingLLM, "reduce", fail)
    result = run(tmp_path, suite="needle", lengths=300, depths=50, plans=PLANS[0])
    assert [g.name for g in result.sections[0].grids] == ["unmodified"]


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_overview_and_markdown() -> None:
    probability = [[0.2, 0.4], [0.6, None]]
    depths = Grid("x", "probability", ["0%", "100%"], ["300", "500"], [[0, 1], [1, None]], probability)
    heads, [(_, values)] = overview([depths])
    assert (heads, values) == (["300", "500"], [0.4, 0.4])
    tasks = replace(depths, rows=["a", "b"])
    assert overview([tasks])[0] == ["a", "b"]
    assert overview([tasks])[1][0][1] == pytest.approx([0.3, 0.6])
    assert overview([replace(tasks, score="recall")])[1][0][1] == [0.5, 1]
    text = markdown([depths], "A note.")
    assert "| depth | 300 | 500 |\n| --- | --: | --: |\n| 0% | 0.20 | 0.40 |\n| 100% | 0.60 | – |" in text
    assert text.index("| 0% | 0.20 |") < text.index("Share of the expected") < text.index("| 0% | 0.00 | 1.00 |")


def test_heat_maps_show_every_cell() -> None:
    picture = heat_map(Grid("x", "recall", ["0%", "100%"], ["300"], [[0.25], [None]], [[0.5], [None]]))
    assert picture.startswith("<svg")
    assert "0.25" in picture and "–" in picture and "0.50" not in picture
    assert "var(--accent)" in picture


def test_grids_of_other_suites_are_empty() -> None:
    assert grids([{"case": "a", "plan": ""}], [Case("a", "document", "text")], [("", "")]) == []


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "needles"}, "did you mean 'needle'"),
        (
            {"suite": "needle", "lengths": [4096]},
            "beyond the 2,048 tokens that the model takes: give shorter --lengths",
        ),
        ({"suite": "needle", "lengths": [2040]}, "beyond the 2,048 tokens"),  # the answer does not fit
        ({"suite": "needle", "lengths": [100]}, "too short: what is to be found takes"),
        ({"suite": "needle", "lengths": []}, "whole numbers of tokens"),
        ({"suite": "needle", "lengths": [0]}, "whole numbers of tokens"),
        ({"suite": "needle", "lengths": [512.5]}, "whole numbers of tokens"),
        ({"suite": "needle", "depths": [0, 101]}, "percentages from 0 to 100"),
        ({"suite": "needle", "depths": [-1]}, "percentages from 0 to 100"),
        ({"suite": "needle", "depths": [float("nan")]}, "percentages from 0 to 100"),
        ({"suite": "needle", "samples": 0}, "at least 1 sample"),
        ({"suite": "needle", "repeats": 3}, "leave --repeats out"),
        ({"suite": "needle", "tasks": ["variables"]}, "--tasks is an option of the suite ruler, not of needle"),
        ({"suite": "ruler", "depths": [50]}, "--depths is an option of the suite needle, not of ruler"),
        ({"suite": "ruler", "tasks": ["variable"]}, "unknown task 'variable': did you mean 'variables'"),
        ({"suite": "ruler", "tasks": "key_valeu"}, "did you mean 'key_value'"),
        ({"suite": "ruler", "tasks": []}, "at least 1 task"),
        ({"suite": "quick", "lengths": [512]}, "--lengths is an option of the suites needle and ruler, not of quick"),
        ({"suite": "quick", "question_later": True}, "--question-later is an option"),
    ],
)
def test_mistakes_are_one_line_before_any_compute(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ThriftError) as error:
        run(tmp_path, **changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    path = tmp_path / "results.jsonl"
    assert not path.exists() or not path.read_bytes()


def test_data_without_text_is_refused(tmp_path: Path) -> None:
    prompts, few = tmp_path / "a.jsonl", tmp_path / "few.txt"
    prompts.write_text('{"prompt": "Hello"}\n')
    few.write_text("Only a handful of words is in here.")
    with pytest.raises(ThriftError, match="hides what is asked for in text: give --data with text"):
        run(tmp_path / "out", data=prompts)
    with pytest.raises(ThriftError, match="the text has 3 different words, too few"):
        run(tmp_path / "out", data=few)


def test_vision_models_are_refused(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    from tokenthrift.models.images import ImageProcessor

    model = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28))
    with pytest.raises(ThriftError, match="the suite 'needle' asks about texts"):
        bench(model, processor=ImageProcessor(), plans="vision=tome(r=1)", out=tmp_path, suite="needle", progress=False)


def test_the_default_suites_are_as_before() -> None:
    assert set(SUITES) == {"quick", "full"}
    assert find_suite("quick", None, {"lengths": None}) == SUITES["quick"]
    assert find_suite("quick", 7, {}).repeats == 7
