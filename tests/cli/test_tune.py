"""`tokenthrift tune` as users see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tokenthrift.core.plan import Plan

from ..bench.tiny_vision import save_encoder, save_images
from .test_bench import call, refused


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_images(tmp_path_factory.mktemp("images")))


def test_prints_json_or_a_table(capsys: pytest.CaptureFixture[str], model: str, images: str, tmp_path: Path) -> None:
    args = (
        "tune", "vision=tome(keep=0.5)", "--model", model, "--data", images, "--out", str(tmp_path / "out"),
        "--generations", "2", "--offspring", "3", "--tolerance", "0.05",
    )  # fmt: skip
    code, stdout, _ = call(capsys, *args, "--json")
    assert code == 0
    found = json.loads(stdout)
    assert found["done"] == 2
    assert Plan.parse(found["plan"]) == Plan.of(tmp_path / "out" / "plan.yaml")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"plan.yaml", "report.json", "results.jsonl"}

    code, stdout, _ = call(capsys, *args)  # all generations are there, so this is quick
    assert code == 0
    assert "FLOPs left" in stdout
    assert "r, tuned: [" in stdout
    assert found["headline"] in stdout.replace("\n", " ")
    assert "holds another run" in refused(capsys, *args, "--seed", "1")
    assert call(capsys, *args, "--seed", "1", "--fresh")[0] == 0


def test_a_plan_file_tunes_too(capsys: pytest.CaptureFixture[str], model: str, images: str, tmp_path: Path) -> None:
    plan = tmp_path / "mine.yaml"
    plan.write_text("vision:\n  tome:\n    r: 4\n")
    out = ("--out", str(tmp_path / "out"), "--generations", "1", "--offspring", "2", "--tolerance", "0.05")
    code, stdout, _ = call(capsys, "tune", str(plan), "--model", model, "--data", images, *out, "--json")
    assert code == 0
    assert json.loads(stdout)["start"] == "vision=tome(r=4)"


def test_bad_requests(capsys: pytest.CaptureFixture[str], model: str, images: str, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"), "--data", images, "--model")
    one = save_images(tmp_path / "one", 1)
    plan = "vision=tome(r=4)"
    assert "no method with budgets" in refused(capsys, "tune", "cache=knorm(budget=40)", *out, model)
    assert "tome" in refused(capsys, "tune", "vision=tomme()", *out, model)
    assert "cannot load 'nonsense'" in refused(capsys, "tune", plan, *out, "nonsense")
    assert "at least 2 images" in refused(capsys, "tune", plan, *out[:2], "--data", str(one), "--model", model)
    assert "there is no file" in refused(capsys, "tune", plan, *out[:2], "--data", "nowhere", "--model", model)
    assert "saves nothing" in refused(capsys, "tune", "vision=tome(r=0)", *out, model)
    assert "unknown search" in refused(capsys, "tune", plan, *out, model, "--search", "random")
    assert "gradient search takes one of" in refused(capsys, "tune", plan, *out, model, "--search", "gradient")
    assert "cannot write" in refused(
        capsys, "tune", plan, "--out", f"{one}/0.png/x", "--data", images, "--model", model
    )


def test_interrupt(
    capsys: pytest.CaptureFixture[str], model: str, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenthrift.bench.store import Store
    from tokenthrift.bench.tuning import Run

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "add", interrupt)
    args = ("tune", "vision=tome(r=4)", "--model", model, "--data", images, "--out", str(tmp_path / "out"))
    code, out, err = call(capsys, *args, "--tolerance", "0.05", "--json")
    assert code == 130
    assert json.loads(out)["interrupted"]
    assert "give the same command again" in err
    monkeypatch.setattr(Run, "result", interrupt)  # a second time, while the held-out inputs are measured
    code, out, err = call(capsys, *args, "--tolerance", "0.05")
    assert (code, out) == (130, "")
    assert "give the same command again" in err
