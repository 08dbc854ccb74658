"""Whole runs on a random model: what is measured, resumed, refused, written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

import tokenthrift as tt
from tokenthrift.bench.language import LanguageBench
from tokenthrift.bench.report import plan_yaml
from tokenthrift.bench.runner import BenchResult, bench
from tokenthrift.bench.store import Store
from tokenthrift.core.errors import ThriftError
from tokenthrift.core.plan import Plan
from tokenthrift.models.images import ImageProcessor

from .tiny import SUITE, a_text, tiny_model, tiny_tokenizer

PLANS = [
    "cache=streaming_llm(budget=40)",
    "text=truncate(rate=0.5)",
    "decode=prompt_lookup()",
    "cache=streaming_llm(budget=40) decode=prompt_lookup()",
]


def run(out: Path, **changes: Any) -> BenchResult:
    settings: dict[str, Any] = {"plans": PLANS, "suite": SUITE, "progress": False}
    return bench(tiny_model(), out=out, processor=tiny_tokenizer(), **{**settings, **changes})


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    return run(tmp_path_factory.mktemp("bench"))


def test_every_plan_is_measured(result: BenchResult) -> None:
    [section] = result.sections
    plain, streaming, text, decode, both = section.results
    assert [r.plan for r in section.results] == ["", *(str(Plan.parse(p)) for p in PLANS)]
    assert not any(r.error for r in section.results)
    assert plain.loss == plain.kl == 0
    assert plain.agreement == plain.time_ratio == plain.kv_ratio == plain.cost == plain.same_output == 1
    assert streaming.kv_ratio < 0.5
    assert streaming.kl > 0
    assert text.tokens < 0.8 * text.tokens_before
    assert text.flops_ratio < 1
    assert decode.kl == 0  # shares the rows of the unmodified model,
    assert decode.exact == 1  # and was checked against it
    assert both.exact == 1
    assert both.kv_ratio == streaming.kv_ratio
    assert set(plain.tasks) == {"continuation", "quote", "lookup"}
    assert sum(r.recommended for r in section.results) == 1


def test_kv_bytes_are_those_of_the_cache(result: BenchResult) -> None:
    rows = [r for r in result.rows if r["kind"] == "quality" and not r["plan"]]
    assert all(r["kv_bytes"] == 2 * 2 * 2 * 8 * 4 * r["tokens"] for r in rows)  # layers, k and v, heads, dim, float32


def test_teacher_forcing_equals_one_forward() -> None:
    runner = LanguageBench(tiny_model(), tiny_tokenizer())
    prompt, more = list(range(3, 60)), list(range(70, 90))
    with torch.no_grad():
        out = runner.model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        followed = runner._follow(out.past_key_values, out.logits[0, -1:], more)
        whole = runner.model(torch.tensor([prompt + more])).logits[0, len(prompt) - 1 : -1]
    assert torch.allclose(followed, whole, atol=1e-5)


def test_plan_yaml_is_ready_to_apply(result: BenchResult) -> None:
    path = result.out / "plan.yaml"
    assert Plan.of(path) == result.plan
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("tokenthrift bench" in line for line in comments)
    with tt.apply(path, tiny_model()):
        pass


def test_nothing_qualifies(result: BenchResult) -> None:
    [section] = result.sections
    plans = [replace(r, recommended=not r.plan) for r in section.results]
    text = plan_yaml(replace(section, results=plans), result)
    assert text.startswith("# No plan is cheaper and loses at most 0.02 in quality")
    assert not Plan.from_yaml(text)


def test_interrupted_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add, measured = Store.add, []

    def add_five(self: Store, row: dict[str, Any]) -> None:
        if len(self.rows) == 5:
            raise KeyboardInterrupt
        add(self, row)

    monkeypatch.setattr(Store, "add", add_five)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    kept = (tmp_path / "results.jsonl").read_bytes()
    (tmp_path / "results.jsonl").write_bytes(kept + b'{"key": "half a li')  # as a kill would leave it

    def note(self: Store, row: dict[str, Any]) -> None:
        measured.append(row["key"])
        add(self, row)

    monkeypatch.setattr(Store, "add", note)
    result = run(tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes().startswith(kept)
    keys = [json.loads(line)["key"] for line in (tmp_path / "results.jsonl").read_text().splitlines()[1:]]
    assert len(keys) == len(set(keys)) == len(measured) + 5
    assert not any(r.error for r in result.sections[0].results)
    measured.clear()
    run(tmp_path)
    assert not measured  # all is there


def test_resumed_quality_equals_uninterrupted(result: BenchResult, tmp_path: Path) -> None:
    """The reference is computed again when a run goes on in the middle of a case."""
    lines = (result.out / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(lines[:3]))
    again = run(tmp_path)
    for a, b in zip(result.sections[0].results, again.sections[0].results, strict=True):
        assert (a.kl, a.loss, a.kv_ratio) == pytest.approx((b.kl, b.loss, b.kv_ratio))


@pytest.mark.parametrize(
    ("changes", "what"), [({"seed": 1}, "data"), ({"plans": PLANS[:1]}, "plans"), ({"suite": "quick"}, "suite")]
)
def test_another_run_in_the_same_folder(result: BenchResult, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ThriftError, match=f"different .*{what}.*--fresh"):
        run(result.out, **changes)


def test_other_weights_are_another_run(result: BenchResult) -> None:
    with pytest.raises(ThriftError, match="different model"):
        bench(tiny_model(seed=1), out=result.out, processor=tiny_tokenizer(), plans=PLANS, suite=SUITE, progress=False)


def test_a_plan_that_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenthrift.cache.streaming_llm import StreamingLLM

    def fail(self: Any, view: Any) -> None:
        raise RuntimeError("no such thing\nhere")

    monkeypatch.setattr(StreamingLLM, "reduce", fail)
    result = run(tmp_path, plans=PLANS[:2])
    failed, fine = result.sections[0].results[1:]
    assert failed.error == "RuntimeError: no such thing here"
    assert not fine.error
    assert "no such thing here" in (tmp_path / "report.html").read_text()


def test_prompts_without_answers_are_ranked_by_agreement(tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text(json.dumps({"prompt": a_text(60)}) + "\n" + json.dumps({"prompt": a_text(40)}) + "\n")
    result = run(tmp_path / "out", data=data, plans=["text=truncate(rate=0.3)"])
    plain, text = result.sections[0].results
    assert not text.tasks
    assert plain.loss == 0
    assert text.loss == pytest.approx(1 - text.agreement)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plans": ["cache=snapkw()"]}, "did you mean 'snapkv'"),
        ({"plans": ["vision=tome(r=8)"]}, "has no stage 'vision'"),
        ({"plans": ["none"]}, "no plan to compare"),
        ({"suite": "quik"}, "did you mean 'quick'"),
        ({"repeats": 0}, "at least 1"),
        ({"max_quality_loss": 2}, "outside 0 to 1"),
        ({"processor": None}, "tokenizer"),
    ],
)
def test_mistakes_fail_before_any_compute(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    settings = {"processor": tiny_tokenizer(), "plans": PLANS, "suite": SUITE, "progress": False}
    with pytest.raises(ThriftError) as error:
        bench(tiny_model(), out=tmp_path, **{**settings, **changes})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "results.jsonl").read_bytes() if (tmp_path / "results.jsonl").exists() else True


def test_nan_weights(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ThriftError, match=r"lm_head\.weight"):
        bench(model, out=tmp_path, processor=tiny_tokenizer(), plans=PLANS, suite=SUITE, progress=False)


def test_vision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=224, patch_size=14)
    model = Dinov2Model(config).eval()
    plan = "vision=tome(r=8)"
    result = bench(model, processor=ImageProcessor(), plans=plan, out=tmp_path, suite=SUITE, progress=False)
    plain, merged = result.sections[0].results
    assert (plain.cls, plain.patches) == pytest.approx((1, 1))
    assert (plain.tokens, merged.tokens) == (257, 257 - 4 * 8)
    assert merged.flops_ratio < 1
    assert 0.5 < merged.cls <= 1 + 1e-6
    assert 0.5 < merged.patches <= 1 + 1e-6
    assert "data:image/jpeg;base64," in (tmp_path / "report.html").read_text()


def test_public_name_is_a_function_before_and_after_import(result: BenchResult) -> None:
    for _ in range(2):
        with pytest.raises(ThriftError, match="unknown suite"):
            tt.bench(tiny_model(), suite="nonsense")
