"""results.jsonl: a header with the run's fingerprint, then one line a measurement; an interrupted run goes on there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..core.errors import ThriftError


class Store:
    """Rows by key. Every :meth:`add` is on disk before it returns, so that nothing measured is ever lost."""

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        self.path = folder / "results.jsonl"
        self.rows: dict[str, dict[str, Any]] = {}
        self.fingerprint: dict[str, Any] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if fresh:
                self.path.unlink(missing_ok=True)
            with self.path.open("ab"):  # fails now, not after the first minutes of compute
                pass
            self._load()
        except OSError as error:
            raise ThriftError(f"cannot write results to {folder}: {error.strerror or error}") from None

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """Start a run, or go on with the one in the file if it is the same one."""
        fingerprint = json.loads(json.dumps(fingerprint))
        if self.fingerprint is None:
            self.fingerprint = fingerprint
            self._append({"fingerprint": fingerprint})
            return
        differ = [k for k in {**self.fingerprint, **fingerprint} if self.fingerprint.get(k) != fingerprint.get(k)]
        if differ:
            raise ThriftError(
                f"{self.path} holds another run (different {', '.join(differ)}): "
                "add --fresh to start over, or choose another --out"
            )

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; ``row["key"]`` names the measurement."""
        self._append(row)
        self.rows[row["key"]] = row

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _load(self) -> None:
        raw = self.path.read_bytes()
        end = raw.rfind(b"\n") + 1
        if end < len(raw):  # the run was killed while it wrote the last line
            with self.path.open("r+b") as file:
                file.truncate(end)
        for number, line in enumerate(raw[:end].splitlines(), start=1):
            try:
                row = json.loads(line)
                if number == 1:
                    self.fingerprint = row["fingerprint"]
                else:
                    self.rows[row["key"]] = row
            except (ValueError, KeyError, TypeError):
                raise ThriftError(
                    f"line {number} of {self.path} is not a result: add --fresh to start over, or choose another --out"
                ) from None
