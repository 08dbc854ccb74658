"""Whole searches on random models: equal cost, held-out figures, resumed, interrupted, refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import tokenthrift as tt
from tokenthrift.bench.store import Store
from tokenthrift.bench.tuning import TuneResult, tune
from tokenthrift.core import method as registry
from tokenthrift.core.errors import ThriftError
from tokenthrift.core.method import find, method
from tokenthrift.core.plan import Plan
from tokenthrift.core.tokenmap import TokenMap

from .tiny import a_text, tiny_model, tiny_tokenizer
from .tiny_vision import PROCESSOR, save_images, tiny_encoder

SMALL: dict[str, Any] = {"generations": 6, "offspring": 6, "tolerance": 0.03, "progress": False}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("images"), 10)


def run(images: Path, out: Path, **changes: Any) -> TuneResult:
    settings = {"plan": "vision=tome(r=5)", "model": tiny_encoder(), "processor": PROCESSOR, "data": images}
    return tune(**{**settings, **SMALL, **changes}, out=out)


@pytest.fixture(scope="module")
def result(images: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    return run(images, tmp_path_factory.mktemp("tune"))


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()[1:]]


def test_the_loss_falls_at_the_same_cost(result: TuneResult) -> None:
    assert (result.searched, result.held_out) == (8, 2)
    assert result.tuned != result.start
    assert 0.97 * result.start_cost <= result.tuned_cost <= result.start_cost < result.dense_cost
    assert result.gain[0] == pytest.approx(result.start_loss - result.tuned_loss)
    assert result.gain[1] <= result.gain[0] <= result.gain[2]
    assert result.plan == (result.tuned if result.gain[0] > 0 else result.start)
    assert result.schedules["start"] == [5, 5, 5, 5]
    assert str(result.tuned) == f"vision=tome(r={result.schedules['tuned']})"
    assert "held-out" in result.headline
    assert "2 held-out" in result.caution


def test_every_generation_is_written(result: TuneResult) -> None:
    found = rows(result.out)
    assert [row["number"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert all(row["fitness"] <= row["parent_fitness"] for row in found)
    costs = [row["cost"] for row in found]
    assert max(costs) / min(costs) < 1 / 0.97 + 1e-6
    assert found[-1]["levels"] == result.schedules["tuned"]


def test_the_files_say_what_was_found(result: TuneResult) -> None:
    path = result.out / "plan.yaml"
    assert Plan.of(path) == result.plan
    assert result.headline in path.read_text()
    assert json.loads((result.out / "report.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    with tt.apply(path, tiny_encoder()):
        pass


def test_deterministic(result: TuneResult, images: Path, tmp_path: Path) -> None:
    again, other = run(images, tmp_path / "again"), run(images, tmp_path / "other", seed=1)
    assert rows(again.out) == rows(result.out)
    assert again.to_dict() | {"out": 0} == result.to_dict() | {"out": 0}
    assert rows(other.out) != rows(result.out)


def test_goes_on_where_it_stopped(
    result: TuneResult, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Store.add

    def add_two(self: Store, row: dict[str, Any]) -> None:
        if len(self.rows) == 2:
            raise KeyboardInterrupt
        add(self, row)

    monkeypatch.setattr(Store, "add", add_two)
    half = run(images, tmp_path)
    assert (half.interrupted, half.done) == (True, 2)
    assert half.tuned == Plan.parse(f"vision=tome(r={rows(tmp_path)[-1]['levels']})")
    assert Plan.of(tmp_path / "plan.yaml") == half.plan  # the best so far
    monkeypatch.undo()
    whole = run(images, tmp_path)
    assert not whole.interrupted
    assert rows(tmp_path) == rows(result.out)
    assert whole.plan == result.plan
    assert run(images, tmp_path, generations=8).done == 8  # and further


def test_interrupted_at_once_the_plan_stays(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Store, row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "add", interrupt)
    found = run(images, tmp_path)
    assert (found.done, found.interrupted, found.plan) == (0, True, found.start)
    assert found.gain == (0, 0, 0)
    assert "stays as it is" in found.headline


def test_other_settings_are_another_search(result: TuneResult, images: Path) -> None:
    for change in ({"seed": 1}, {"offspring": 4}, {"plan": "vision=tome(r=4)"}):
        with pytest.raises(ThriftError, match="--fresh"):
            run(images, result.out, **change)


def test_a_share_is_tuned_at_its_cost(images: Path, tmp_path: Path) -> None:
    found = run(images, tmp_path, plan="vision=tome(keep=0.5)")
    assert str(found.start) == "vision=tome(keep=0.5)"
    assert found.schedules["start"] == [5, 5, 4, 4]
    assert found.tuned_cost <= found.start_cost


def test_worse_on_held_out_inputs_the_plan_stays(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenthrift.bench.tuning.bootstrap", lambda values, seed: (-0.1, -0.2, 0.0))
    found = run(images, tmp_path)
    assert found.tuned != found.start
    assert found.plan == found.start
    assert found.to_dict()["kept_start"]
    assert "did not fall" in found.headline
    assert Plan.of(tmp_path / "plan.yaml") == found.start


@pytest.fixture
def last_entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache method with a budget a layer; no other family than the one that defines it knows of it."""
    find("tome")
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))

    @method("last_entries", stage="cache", paper="A toy", needs=("keys", "layer", "layers"))
    class LastEntries:
        """Keep the last entries."""

        per_layer: ClassVar[str] = "budget"
        budget: Any = 16

        def reduce(self, view: Any) -> TokenMap:
            batch, heads, n, _ = view.keys.shape
            mine = self.budget[view.layer] if isinstance(self.budget, list) else self.budget
            if mine < 4:
                raise ThriftError("too few")
            return TokenMap.select(torch.arange(n - mine, n).expand(batch, heads, mine), n)

    yield


@pytest.mark.usefixtures("last_entries")
def test_language_models_at_equal_cache_bytes(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.md").write_text(a_text(700))
    found = tune(
        "cache=last_entries(budget=24)", tiny_model(context=200), tmp_path / "texts", tmp_path / "out",
        processor=tiny_tokenizer(), inputs=6, step=3, **SMALL,
    )  # fmt: skip
    assert found.unit == "cache bytes"
    assert found.tuned_cost == found.start_cost < found.dense_cost
    assert sum(found.schedules["tuned"]) == 48
    assert all(min(row["levels"]) >= 4 for row in rows(found.out))  # what the method refuses is never chosen


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"plan": "cache=knorm(budget=40)"}, "no method with budgets layer by layer"),
        ({"plan": "vision=tomy(r=8)"}, "did you mean 'tome'"),
        ({"plan": "vision=tome(r=0)"}, "saves nothing"),
        ({"plan": "vision=tome(keep=1.0)"}, "saves nothing"),
        ({"plan": "vision=tome(r=30)", "model": tiny_encoder(layers=8)}, "leaves 2 of 37 tokens"),
        ({"plan": "text=truncate(rate=0.5)"}, "no method with budgets"),
        ({"model": "nonsense"}, "cannot load 'nonsense'"),
        ({"model": tiny_model(), "processor": tiny_tokenizer()}, "has no stage 'vision'"),
        ({"search": "evolve"}, "did you mean 'evolution'"),
        ({"search": "gradient"}, "takes one of diffrate, pyra"),
        ({"generations": 0}, "at least 1"),
        ({"tolerance": 1.5}, "outside 0 to 1"),
        ({"tolerance": 0.0, "step": 17}, "higher tolerance"),
        ({"data": "nowhere"}, "there is no file nowhere"),
    ],
)
def test_mistakes(images: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ThriftError) as error:
        run(images, tmp_path, **changes)
    assert says in str(error.value)
    assert not (tmp_path / "plan.yaml").exists()


def test_too_few_images(tmp_path: Path) -> None:
    with pytest.raises(ThriftError, match="at least 2 images"):
        run(save_images(tmp_path / "one", 1), tmp_path / "out")
    (tmp_path / "none").mkdir()
    with pytest.raises(ThriftError, match="holds no files that end in"):
        run(tmp_path / "none", tmp_path / "out")


def test_two_images_are_enough(tmp_path: Path) -> None:
    found = run(save_images(tmp_path / "two", 2), tmp_path / "out", generations=1)
    assert (found.searched, found.held_out) == (1, 1)


@pytest.mark.parametrize(("name", "learner"), [("diffrate", "learn_rates"), ("pyra", "learn_pyra")])
def test_gradient(images: Path, tmp_path: Path, name: str, learner: str) -> None:
    pytest.importorskip(f"tokenthrift.models.{learner}")
    found = run(images, tmp_path, plan=f"vision={name}(keep=0.5)", search="gradient", steps=3)
    assert found.done == 3
    assert found.tuned != found.start
    assert found.tuned_cost <= 1.1 * found.start_cost
    assert found.schedules
    assert Plan.of(tmp_path / "plan.yaml") == found.plan
    with torch.no_grad(), tt.apply(found.tuned, tiny_encoder()) as session:
        tiny_encoder()(torch.zeros(1, 3, 48, 48))
    assert session.plan == found.tuned


@pytest.mark.slow
@pytest.mark.packs
def test_real_model(tmp_path: Path) -> None:
    found = tune("vision=tome(r=16)", "dinov2-s", None, tmp_path, generations=1, offspring=2, progress=False)
    assert found.tuned_cost <= found.start_cost
    assert (found.searched, found.held_out) == (3, 1)
