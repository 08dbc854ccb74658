"""What was measured of a model once, for a method to read later: a JSON file that knows which model it belongs to."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from ..core.errors import ThriftError
from .decoder import find_attentions

_ROWS = 16  # of the input embeddings, whose lengths tell models of one shape apart
_TOLERANCE = 0.03  # between two forms of the same weights: float32, bfloat16, converted from four bits


@dataclass(frozen=True)
class Calibration:
    """Figures about one model.

    Attributes:
        method: the name of the method that they are for.
        model: what the model is known by; see :func:`identity`.
        data: the figures, plain data for JSON.
    """

    method: str
    model: dict[str, Any]
    data: dict[str, Any]

    @classmethod
    def of(cls, method: str, model: Any, data: dict[str, Any]) -> Calibration:
        """Figures that were just measured on ``model``."""
        return cls(method, identity(model), data)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a JSON file that :meth:`load` reads."""
        Path(path).write_text(json.dumps(vars(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str], method: str) -> Calibration:
        """Read what :meth:`save` wrote for ``method``. Raises ThriftError for anything else."""
        try:
            found = cls(**json.loads(Path(path).read_text(encoding="utf-8")))
            if not isinstance(found.model, dict) or not isinstance(found.data, dict):
                raise TypeError("it is no calibration")
        except (OSError, ValueError, TypeError) as error:
            said = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise ThriftError(f"cannot read a calibration from {fspath(path)} ({said}): {_make(method)}") from None
        if found.method != method:
            raise ThriftError(f"{fspath(path)} is a calibration of {found.method}, not of {method}: {_make(method)}")
        return found

    def fits(self, model: Any) -> bool:
        """Whether it was made on this model."""
        return _same(self.model, identity(model))

    def check(self, model: Any, path: str) -> Calibration:
        """Returns itself. Raises ThriftError if it was made on another model."""
        if not self.fits(model):
            here, there = _words(identity(model)), _words(self.model)
            what = f"for another model ({there}, not {here})" if here != there else f"for other weights of {here}"
            raise ThriftError(f"the calibration {path} was made {what}: {_make(self.method)}")
        return self


def calibration_for(method: str, model: Any, path: str | None) -> Calibration:
    """The calibration in a file, or without one that which comes with this library, if there is one for the model.

    Raises:
        ThriftError: there is none, it cannot be read, or it was made on another model.
    """
    if path is not None:
        return Calibration.load(path, method).check(model, path)
    for file in (files("tokenthrift") / "data" / "calibration").iterdir():
        if file.name.startswith(f"{method}-") and file.name.endswith(".json"):
            found = Calibration(**json.loads(file.read_text(encoding="utf-8")))
            if found.fits(model):
                return found
    raise ThriftError(f"{method} was never calibrated for this {_words(identity(model))}: {_make(method)}")


def identity(model: Any) -> dict[str, Any]:
    """What tells a model from others: its type and shape, and the lengths of some rows of its embeddings."""
    config = model.config.get_text_config(decoder=True)
    weights = model.get_input_embeddings().weight
    step = max(len(weights) // _ROWS, 1)
    lengths = weights.detach()[step // 2 :: step][:_ROWS].float().norm(dim=-1)
    return {
        "type": config.model_type,
        "layers": len(find_attentions(model)),
        "heads": config.num_attention_heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "hidden": config.hidden_size,
        "vocabulary": config.vocab_size,
        "embeddings": [round(x, 5) for x in lengths.tolist()],
    }


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    rows: list[Sequence[float]] = [d.get("embeddings", ()) for d in (one, other)]
    return {**one, "embeddings": 0} == {**other, "embeddings": 0} and (
        len(rows[0]) == len(rows[1])
        and all(math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=1e-6) for a, b in zip(*rows, strict=True))
    )


def _words(model: dict[str, Any]) -> str:
    return f"{model.get('type')} of {model.get('layers')} layers, {model.get('kv_heads')} key/value heads"


def _make(method: str) -> str:
    return f"make one with 'tokenthrift calibrate {method} --model MODEL --out FILE'"
