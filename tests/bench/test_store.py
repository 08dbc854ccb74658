from pathlib import Path

import pytest

from tokenthrift.bench.store import Store
from tokenthrift.core.errors import ThriftError


def filled(folder: Path) -> Store:
    store = Store(folder)
    store.begin({"seed": 0, "model": "m"})
    for key in ("a", "b"):
        store.add({"key": key, "value": 0.1})
    return store


def test_rows_come_back(tmp_path: Path) -> None:
    filled(tmp_path)
    again = Store(tmp_path)
    again.begin({"seed": 0, "model": "m"})
    assert again.rows == {"a": {"key": "a", "value": 0.1}, "b": {"key": "b", "value": 0.1}}
    assert "a" in again
    assert "c" not in again


def test_truncated_last_line_is_dropped(tmp_path: Path) -> None:
    path = filled(tmp_path).path
    whole = path.read_bytes()
    for cut in range(1, 20):
        path.write_bytes(whole[:-cut])
        again = Store(tmp_path)
        again.begin({"seed": 0, "model": "m"})
        assert list(again.rows) == ["a"]
        again.add({"key": "b", "value": 0.1})
        assert path.read_bytes() == whole


def test_truncated_header_starts_over(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.path.write_bytes(store.path.read_bytes()[:10])
    again = Store(tmp_path)
    again.begin({"seed": 1})
    assert not again.rows


def test_another_run_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(ThriftError, match=r"different seed\).*--fresh.*--out"):
        Store(tmp_path).begin({"seed": 1, "model": "m"})
    fresh = Store(tmp_path, fresh=True)
    fresh.begin({"seed": 1, "model": "m"})
    assert not fresh.rows


def test_damaged_line_is_named(tmp_path: Path) -> None:
    path = filled(tmp_path).path
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{oops", lines[2], ""]))
    with pytest.raises(ThriftError, match="line 2"):
        Store(tmp_path)


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ThriftError, match="cannot write results"):
        Store(tmp_path / "file" / "out")
