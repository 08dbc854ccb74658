"""One part: its texts shortened, and written to the output folder at once or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ...core.errors import ThriftError
from .inputs import Part, read

if TYPE_CHECKING:
    import pyarrow as pa

_KEY = b"tokenthrift"


@dataclass(frozen=True)
class Settings:
    """What is done to every text. Plain data: it goes to other processes, and into the output's manifest.

    Attributes:
        column: where the texts are.
        method, params, options: as ``tokenthrift.compress`` takes them; the tokenizer by its name.
        model: model pack, folder or hub id whose tokenizer counts and whose probabilities score.
    """

    column: str
    method: str
    params: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    model: str = "smollm2-135m"


@dataclass(frozen=True)
class Done:
    """What came of a part; ``first_error`` is that of the first row that failed."""

    index: int
    rows: int
    failed: int
    tokens_before: int
    tokens_after: int
    first_error: str | None

    @classmethod
    def of_file(cls, path: Path) -> Done:
        """As it was noted in the part's own file, which is there as a whole or not at all."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return cls(**json.loads((pq.read_schema(path).metadata or {})[_KEY]))
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
            raise ThriftError(f"{path} was not written by this command ({error!r}): remove it and go on") from None


class Shortener:
    """Shortens parts of a corpus; loads what the method needs once, before the first text.

    Raises:
        ThriftError: when called, if the settings fit no text at all, or the input has changed.
    """

    def __init__(self, settings: Settings, kinds: dict[str, str], folder: Path) -> None:
        self.settings, self.kinds, self.folder = settings, kinds, folder
        self._ready = False

    def __call__(self, part: Part) -> Done:
        """Write the part's file, unless it is there already."""
        file = self.folder / part.name
        if file.exists():  # of a worker that was lost when it had just finished
            return Done.of_file(file)
        table, texts, errors = read(part, self.settings.column, self.kinds)
        if table.num_rows != part.rows:
            raise ThriftError(f"{part.path} changed while it was read: start again with another output folder")
        if not self._ready:  # what fails here would fail for every row
            self._shorten("This is a text of one sentence.")
            self._ready = True
        made: dict[str, list[Any]] = {name: [] for name in _types()}
        for text, error in zip(texts, errors, strict=True):
            row = {"error": error} if error else self._row(text)
            for name, values in made.items():
                values.append(row.get(name))
        done = Done(
            part.index,
            part.rows,
            sum(error is not None for error in made["error"]),
            sum(n or 0 for n in made["tokens_before"]),
            sum(n or 0 for n in made["tokens_after"]),
            next((error for error in made["error"] if error), None),
        )
        write(self._with(table, made, done), file)
        return done

    def _row(self, text: Any) -> dict[str, Any]:
        if text is None:
            return {"error": "there is no text (null)"}
        if not isinstance(text, str):
            return {"error": f"no text, but {type(text).__name__}"}
        try:
            out = self._shorten(text)
        except Exception as error:  # one text must not stop millions of others
            said = str(error).strip().split("\n")[0]
            return {"error": said if isinstance(error, ThriftError) else f"{type(error).__name__}: {said}"}
        return {
            "compressed": out.text,
            "tokens_before": out.tokens_before,
            "tokens_after": out.tokens_after,
            "notes": "; ".join(out.notes) or None,
        }

    def _shorten(self, text: str) -> Any:
        from ... import api
        from ...core.method import find

        how = self.settings
        # The model is loaded only if it scores, or its tokenizer counts.
        scores = "scorer" in find(how.method, "text").needs or how.options.get("tokenizer") is None
        scorer = api.load_scorer(how.model) if scores else None
        return api.compress(text, how.method, scorer=scorer, **how.params, **how.options)

    @staticmethod
    def _with(table: pa.Table, made: dict[str, list[Any]], done: Done) -> pa.Table:
        import pyarrow as pa

        for name, kind in _types().items():
            table = table.append_column(name, pa.array(made[name], kind))
        return table.replace_schema_metadata({**(table.schema.metadata or {}), _KEY: json.dumps(vars(done))})


def _types() -> dict[str, Any]:
    """Of the columns in ``inputs.MADE``."""
    import pyarrow as pa

    text, count = pa.string(), pa.int64()
    return {"compressed": text, "tokens_before": count, "tokens_after": count, "notes": text, "error": text}


def write(table: pa.Table, file: Path) -> None:
    """Write a Parquet file under another name first, so that under its own it is whole whenever it is there."""
    import pyarrow.parquet as pq

    temporary = file.with_name(f".{file.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as out:
            pq.write_table(table, out)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
