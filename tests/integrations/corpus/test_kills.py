"""Runs that are killed for real, by SIGKILL in the middle, and gone on with: the same rows as without."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ...text.tiny import PROSE, tokenizer

pytest.importorskip("pyarrow", reason="needs the extra: corpus")

import pyarrow as pa
import pyarrow.parquet as pq

pytestmark = pytest.mark.slow
ROWS, PART = 900, 15


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that take a while, one of them without a text."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer().save_pretrained(folder / "tokenizer")
    texts: list[str | None] = [f"{i}. {PROSE * 4}" for i in range(ROWS)]
    texts[ROWS // 2] = None
    table = pa.table({"id": range(ROWS), "text": texts})
    pq.write_table(table.slice(0, 300), folder / "a.parquet", row_group_size=100)
    pq.write_table(table.slice(300), folder / "b.parquet")
    return folder


def command(data: Path, out: Path, *more: str) -> list[str]:
    run = "from tokenthrift.cli.main import run; run()"
    settings = ["--method", "truncate", "--rate", "0.3", "--tokenizer", str(data / "tokenizer")]
    places = ["--input", str(data / "*.parquet"), "--output", str(out), "--part-rows", str(PART)]
    return [sys.executable, "-c", run, "compress", *places, *settings, *more]


def start(data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command(data, out, *more), env=environment, stdout=pipe, stderr=pipe, text=True)


def wait_for(happens: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 500) -> Any:
    """What ``happens`` returns once it is true, while the process runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := happens():
            return found
        if process.poll() is not None:
            raise AssertionError(f"it ended before: {process.communicate()[1]}")
        time.sleep(0.01)
    raise AssertionError("it did not happen in time")


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(out.glob("part-*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("whole")
    process = start(data, out)
    _, said = process.communicate()
    assert process.returncode == 0, said
    found = rows(out)
    assert [row["id"] for row in found] == list(range(ROWS))
    assert [row["id"] for row in found if row["error"]] == [ROWS // 2]
    return found


def done(out: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in out.glob("part-*.parquet")}


def check_going_on(data: Path, out: Path, whole: list[dict[str, Any]], *more: str) -> None:
    kept = done(out)
    assert 0 < len(kept) < ROWS // PART, "it was not killed in the middle"
    process = start(data, out, *more)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert f"{len(kept)} of the parts were done before" in said
    assert {name: state for name, state in done(out).items() if name in kept} == kept
    assert rows(out) == whole
    assert not [p.name for p in out.iterdir() if p.suffix == ".tmp"]


def test_a_driver_is_killed(data: Path, tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    process = start(data, tmp_path / "out")
    wait_for(lambda: len(done(tmp_path / "out")) >= 2, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    check_going_on(data, tmp_path / "out", whole)


def children(pid: int) -> dict[int, str]:
    """All processes that descend from one, and what they are called."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ").strip()
        except OSError:  # it has ended
            continue
    found, fresh = set(), {pid}
    while fresh:
        found |= fresh
        fresh = {p for p, parent in parents.items() if parent in fresh} - found
    return {p: names.get(p, "") for p in found - {pid}}


@pytest.fixture
def ray() -> tuple[str, ...]:
    pytest.importorskip("ray.data", reason="needs the extra: ray")
    if not Path("/proc").is_dir():
        pytest.skip("workers are found in /proc")
    return "--engine", "ray", "--workers", "2"


def worker_of(process: subprocess.Popen[str]) -> int | None:
    """An actor of Ray Data that works for it."""
    return next((p for p, name in children(process.pid).items() if name.startswith("ray::Map")), None)


def test_a_worker_of_ray_is_killed(data: Path, tmp_path: Path, whole: list[dict[str, Any]], ray: tuple[str]) -> None:
    out = tmp_path / "out"
    process = start(data, out, *ray)
    wait_for(lambda: len(done(out)) >= 2, process)
    os.kill(wait_for(lambda: worker_of(process), process), signal.SIGKILL)
    before = done(out)
    assert len(before) < ROWS // PART, "it was not killed in the middle"
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert {name: state for name, state in done(out).items() if name in before} == before
    assert rows(out) == whole
    assert "900 rows" in said
    assert "1 rows failed" in said


def test_a_driver_on_ray_is_killed(data: Path, tmp_path: Path, whole: list[dict[str, Any]], ray: tuple[str]) -> None:
    out = tmp_path / "out"
    process = start(data, out, *ray)
    wait_for(lambda: len(done(out)) >= 2, process)
    family = children(process.pid)
    process.kill()
    process.wait()
    end = time.monotonic() + 120
    while any(Path(f"/proc/{p}").exists() and name.startswith("ray::Map") for p, name in family.items()):
        assert time.monotonic() < end, "workers outlive their driver"
        time.sleep(0.1)
    check_going_on(data, out, whole, *ray)


def test_mistakes_on_ray_are_one_line(data: Path, tmp_path: Path, ray: tuple[str]) -> None:
    process = start(data, tmp_path / "out", *ray, "--method", "llmlingua2", "--param", "model=no/where/at/all")
    _, said = process.communicate()
    assert process.returncode == 2
    assert said.strip().splitlines()[-1].startswith("error: cannot load 'no/where/at/all'")
    assert "Traceback" not in said
    assert not rows(tmp_path / "out")
