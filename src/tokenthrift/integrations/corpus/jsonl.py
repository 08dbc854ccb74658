"""Rows of JSONL files, and the columns that they make together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import ThriftError

if TYPE_CHECKING:
    import pyarrow as pa

Row = tuple[dict[str, Any], str | None]
"""The object of a line, or an empty one and what is wrong with the line."""


def look(path: str, rows: int, kinds: dict[str, str]) -> tuple[list[int], int, list[str]]:
    """Where every ``rows``-th row begins, in bytes; how many rows there are; and the columns.

    ``kinds`` gets the kind of each column, such that it holds the values of all files looked at: ``bool``, ``int64``,
    ``double`` and ``string``, or ``json`` for everything else and for mixtures.
    """
    starts, total, names = [], 0, {}
    for at, line in _lines(path):
        if total % rows == 0:
            starts.append(at)
        total += 1
        for name, value in _row(line)[0].items():
            names[name] = True
            kinds[name] = _both(kinds.get(name, ""), _kind(value))
    return starts, total, list(names)


def read(path: str, at: int, rows: int) -> list[Row]:
    """So many rows from byte ``at`` on."""
    return [_row(line) for _, line in islice(_lines(path, at), rows)]


def table(rows: Sequence[Row], kinds: dict[str, str]) -> pa.Table:
    """The rows' columns; what a row has not is null."""
    import pyarrow as pa

    types = {"bool": pa.bool_(), "int64": pa.int64(), "double": pa.float64()}
    return pa.table(
        {
            name: pa.array([_fitting(row.get(name), kind) for row, _ in rows], types.get(kind, pa.string()))
            for name, kind in kinds.items()
        }
    )


def _lines(path: str, at: int = 0) -> Iterator[tuple[int, bytes]]:
    """Where each line begins, and the line; empty ones are no rows."""
    try:
        with Path(path).open("rb") as file:
            file.seek(at)
            for line in file:
                if line.strip():
                    yield at, line
                at += len(line)
    except OSError as error:
        raise ThriftError(f"cannot read {path}: {error.strerror}") from None


def _row(line: bytes) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return {}, f"the line is not valid JSON: {error}"
    return (row, None) if isinstance(row, dict) else ({}, "the line is no JSON object")


def _kind(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "bool"
        case int() if -(2**63) <= value < 2**63:
            return "int64"
        case float():
            return "double"
        case str():
            return "string"
    return "json"


def _both(one: str, other: str) -> str:
    """The kind that holds values of two; ``""`` is that of nulls."""
    if one == other or not other:
        return one
    if not one:
        return other
    return "double" if {one, other} == {"int64", "double"} else "json"


def _fitting(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind == "double":
        return float(value)
    if kind == "json" or (kind == "string" and not isinstance(value, str)):
        value = json.dumps(value, ensure_ascii=False)
    # Half of a character, which JSON can spell, has no place in a table.
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
