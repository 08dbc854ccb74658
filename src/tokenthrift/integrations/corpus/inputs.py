"""The files of a corpus, cut into parts that are the same in every run."""

from __future__ import annotations

import glob
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import ThriftError, did_you_mean
from . import jsonl, parquet

if TYPE_CHECKING:
    import pyarrow as pa

MADE = ("compressed", "tokens_before", "tokens_after", "notes", "error")
"""The columns that come on top of those of a file."""


@dataclass(frozen=True)
class File:
    """One file as it was found: by what a change of it is noticed, and how many rows it has."""

    path: str
    bytes: int
    changed: int
    rows: int


@dataclass(frozen=True)
class Part:
    """``rows`` rows of a file from row ``first`` on; in a JSONL file these begin at byte ``at``."""

    index: int
    path: str
    first: int
    rows: int
    at: int

    @property
    def name(self) -> str:
        """Of the file that it becomes; the names' order is that of the rows."""
        return f"part-{self.index:06d}.parquet"


@dataclass(frozen=True)
class Corpus:
    """Files and their parts, in order; ``kinds`` says of what kind the columns of all JSONL files together are."""

    files: list[File]
    parts: list[Part]
    kinds: dict[str, str]

    def inputs(self) -> list[dict[str, Any]]:
        """Plain data by which changed files are noticed."""
        return [asdict(file) for file in self.files]


def find(pattern: str, column: str, rows: int) -> Corpus:
    """The corpus of a pattern.

    Args:
        pattern: a glob, ``**`` included, of ``.parquet``, ``.jsonl`` and ``.ndjson`` files.
        column: where the texts are.
        rows: how many of them make a part.

    Raises:
        ThriftError: nothing fits, a file of another kind or that cannot be read, no such column, one that the output
            would have twice, or pyarrow is missing.
    """
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError:
        raise ThriftError("corpora need pyarrow: pip install 'tokenthrift[corpus]'") from None
    if rows < 1:
        raise ThriftError(f"--part-rows {rows} holds no row: give at least 1, such as 1000")
    fitting = glob.glob(str(Path(pattern).expanduser()), recursive=True)  # noqa: PTH207  (Path's takes no absolute one)
    paths = sorted(path for path in fitting if Path(path).is_file())
    if not paths:
        raise ThriftError(f"no file fits --input {pattern}: give a pattern in quotes, such as 'data/*.parquet'")
    kinds: dict[str, str] = {}
    corpus = Corpus([], [], kinds)
    for path in paths:
        match Path(path).suffix.lower():
            case ".parquet":
                total, names = parquet.look(path)
                starts = [0] * -(-total // rows)
            case ".jsonl" | ".ndjson":
                starts, total, names = jsonl.look(path, rows, kinds)
            case _:
                raise ThriftError(f"{path} is neither .parquet nor .jsonl: narrow --input, e.g. to '*.parquet'")
        if total and column not in names:
            raise ThriftError(f"{path} has no column '{column}' (--column): {did_you_mean(column, names)}")
        for name in MADE:
            if name in names:
                raise ThriftError(f"{path} has a column '{name}', which the output would have twice: rename it")
        state = Path(path).stat()
        corpus.files.append(File(str(Path(path).resolve()), state.st_size, state.st_mtime_ns, total))
        for k, at in enumerate(starts):
            part = Part(len(corpus.parts), corpus.files[-1].path, k * rows, min(rows, total - k * rows), at)
            corpus.parts.append(part)
    if column in kinds:
        kinds[column] = "string"  # whatever else is in it, is no text
    return corpus


def read(part: Part, column: str, kinds: dict[str, str]) -> tuple[pa.Table, list[Any], list[str | None]]:
    """The rows of a part: all columns, what is in the column of texts, and what is wrong with a row as such."""
    if part.path.lower().endswith(".parquet"):
        table = parquet.read(part.path, part.first, part.rows)
        return table, table.column(column).to_pylist(), [None] * part.rows
    found = jsonl.read(part.path, part.at, part.rows)
    return jsonl.table(found, kinds), [row.get(column) for row, _ in found], [error for _, error in found]
