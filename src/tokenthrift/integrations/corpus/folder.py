"""The output folder: what it was made from, which parts are done, and one run at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ... import __version__
from ...core.errors import ThriftError
from .inputs import Corpus, Part
from .job import Done, Settings

MANIFEST = "manifest.json"
"""What the output was made from, and the parts that it has when it is complete."""


def opened(folder: Path, corpus: Corpus, settings: Settings, rows: int) -> list[Done]:
    """Make the folder ready, or take up what an earlier run left in it: the parts that are done.

    Raises:
        ThriftError: it holds something else, or the output of other settings or inputs.
    """
    # By way of JSON, so that what is compared is what is read again.
    made_of = {
        "tokenthrift": __version__,
        "settings": {**asdict(settings), "part_rows": rows},
        "columns": corpus.kinds,
        "inputs": corpus.inputs(),
        "parts": [part.name for part in corpus.parts],
    }
    wanted = json.loads(json.dumps(made_of, default=str))
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / MANIFEST
    found = _read(manifest) if manifest.exists() else None
    if found is None and (others := [p.name for p in folder.iterdir() if not _own(p)]):
        raise ThriftError(f"{folder} holds other files, such as {others[0]}: give an empty folder as --output")
    if found != wanted:
        if any(folder.glob("part-*.parquet")):
            raise ThriftError(
                f"{folder} is the output of {_difference(found, wanted)}: give another --output, or go back"
            )
        _write(manifest, wanted)  # nothing was done yet
    for file in folder.glob(".*.tmp"):  # of workers that were killed
        with suppress(OSError):
            file.unlink()
    return [Done.of_file(folder / part.name) for part in corpus.parts if (folder / part.name).exists()]


def pending(corpus: Corpus, done: Sequence[Done]) -> list[Part]:
    """The parts that are still to do."""
    finished = {d.index for d in done}
    return [part for part in corpus.parts if part.index not in finished]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder. The lock goes with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            import fcntl
        except ModuleNotFoundError:  # Windows has no such lock; parts are whole all the same
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ThriftError(f"another run is writing to {folder}: wait for it, or stop it") from None
        yield


def _own(path: Path) -> bool:
    return path.name == ".lock" or path.name.endswith(".tmp")


def _write(path: Path, data: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as out:
        json.dump(data, out, indent=1, ensure_ascii=False)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ThriftError(f"{path} is not valid JSON ({error}): give another --output") from None


def _difference(found: Any, wanted: Any) -> str:
    """What an existing output differs in, in a few words."""
    if not isinstance(found, dict):
        return "something else"
    for name, value in wanted["settings"].items():
        if (was := (found.get("settings") or {}).get(name)) != value:
            return f"other settings ({name} was {was!r}, now {value!r})"
    if found.get("inputs") != wanted["inputs"]:
        before, after = ({f["path"]: f for f in data.get("inputs") or []} for data in (found, wanted))
        path = next(p for p in {**after, **before} if before.get(p) != after.get(p))
        what = "is new" if path not in before else "is gone" if path not in after else "has changed"
        return f"other inputs ({path} {what})"
    return f"tokenthrift {found.get('tokenthrift')} (this is {wanted['tokenthrift']})"
