"""Rows of Parquet files."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import ThriftError

if TYPE_CHECKING:
    import pyarrow as pa


def look(path: str) -> tuple[int, list[str]]:
    """How many rows a file has, and its columns. Raises ThriftError if it cannot be read."""
    file = _open(path)
    return file.metadata.num_rows, file.schema_arrow.names


def read(path: str, first: int, rows: int) -> pa.Table:
    """So many rows from row ``first`` on."""
    import pyarrow as pa

    metadata, changed = _open(path).metadata, Path(path).stat().st_mtime_ns
    pieces, start = [], 0
    for group in range(metadata.num_row_groups):
        end = start + metadata.row_group(group).num_rows
        low, high = max(first, start), min(first + rows, end)
        if low < high:
            pieces.append(_row_group(path, changed, group).slice(low - start, high - low))
        start = end
    return pa.concat_tables(pieces)


def _open(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise ThriftError(f"cannot read {path} as Parquet: {error}") from None


@lru_cache(maxsize=1)
def _row_group(path: str, changed: int, group: int) -> pa.Table:
    """Decoded as a whole, and kept: the next part is often of the same one."""
    return _open(path).read_row_group(group)
