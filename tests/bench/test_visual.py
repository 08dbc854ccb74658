"""Benchmarks of vision-language models: what is measured of a plan, what pictures show, and what cannot be measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.test_thrift_vlm import encoder, parts  # noqa: F401  (fixtures: a small random model)

import tokenthrift as tt
from tokenthrift.bench.plans import kind_of
from tokenthrift.bench.runner import bench
from tokenthrift.bench.seeing import questions
from tokenthrift.bench.tasks import SUITES
from tokenthrift.bench.visual import VisualBench
from tokenthrift.core.errors import ThriftError
from tokenthrift.core.plan import Plan
from tokenthrift.models.packs import composed

pytestmark = pytest.mark.packs


@pytest.fixture(scope="module")
def loaded(encoder: Path, parts: Path) -> tuple[Any, Any]:  # noqa: F811
    return composed.compose(encoder, torch.float32, None, parts).eval(), composed.processor(parts)


@pytest.fixture(scope="module")
def asked() -> Any:
    return questions(seed=0, count=3)[0]


def test_a_row_counts_what_the_plan_left(loaded: Any, asked: Any) -> None:
    runner = VisualBench(*loaded)
    plain = runner.measure(Plan(), asked)
    fewer = runner.measure(Plan.parse("connector=divprune(keep=0.25)"), asked)
    assert plain["tokens"] == plain["tokens_before"] == fewer["tokens_before"]
    assert plain["tokens"] - fewer["tokens"] == 256 - 64
    assert fewer["kv_bytes"] < plain["kv_bytes"] / 2
    assert [kind for kind, _ in fewer["scores"]] == [question.kind for question in asked.questions]


@pytest.mark.parametrize(
    ("plan", "left"),
    [
        ("connector=divprune(keep=0.25)", 64),
        ("connector=pool_tokens(keep=0.25)", 64),
        ("connector=random_tokens(keep=32) cache=snapkv(budget=20, window=8)", 32),
        ("vision=tome(r=16)", 256 - 8 * 16),  # the connector reads what eight of twelve layers leave
        ("vision=tome(r=16) connector=divprune(keep=20)", 20),
    ],
)
def test_pictures_show_the_patches_that_are_left(loaded: Any, asked: Any, plan: str, left: int) -> None:
    map, answer = VisualBench(*loaded).shown(Plan.parse(plan), asked, asked.questions[0])
    assert map is not None and isinstance(answer, str)
    assert (map.n_in, map.n_out) == (256, left)
    merges = "pool" in plan or plan == "vision=tome(r=16)"
    assert int(map.kept.sum()) == 256 if merges else int(map.kept.sum()) >= left


def test_without_a_plan_there_is_nothing_to_show(loaded: Any, asked: Any) -> None:
    assert VisualBench(*loaded).shown(Plan(), asked, asked.questions[0])[0] is None


def test_a_run_writes_a_report_with_questions_and_pictures(loaded: Any, tmp_path: Path) -> None:
    model, processor = loaded
    suite = dataclasses.replace(SUITES["quick"], scenes=2)
    plans = ["connector=uniform_tokens(keep=0.5)", "connector=hired(early_layer=40)"]
    result = bench(model, plans=plans, suite=suite, out=tmp_path, processor=processor, progress=False)
    [section] = result.sections
    assert section.kind == "visual"
    assert [r.error.partition(":")[0] for r in section.results] == ["", "", "ThriftError"]
    assert section.results[1].tokens < section.results[1].tokens_before
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "256 → 128 tokens" in page and section.asked[0].questions[0].text in page
    again = bench(model, plans=plans, suite=suite, out=tmp_path, processor=processor, progress=False)
    assert again.rows == result.rows  # nothing was measured twice


def test_data_of_ones_own_is_refused(loaded: Any, tmp_path: Path) -> None:
    model, processor = loaded
    (tmp_path / "a.txt").write_text("Words enough to be a document. " * 50, encoding="utf-8")
    with pytest.raises(ThriftError, match="without --data"):
        tt.bench(model, data=tmp_path / "a.txt", processor=processor, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("plan", "kind"),
    [
        ("vision=tome()", "vision"),
        ("connector=divprune()", "visual"),
        ("vision=tome() connector=divprune() cache=snapkv()", "visual"),
        ("prefill=fastv()", "visual"),
        ("prefill=gemfilter()", "language"),
        ("cache=snapkv()", "language"),
    ],
)
def test_each_plan_has_its_kind_of_model(plan: str, kind: str) -> None:
    assert kind_of(Plan.parse(plan)) == kind
