"""What decode methods are compared on: prompts of six kinds, and the plans that change no token."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import chain, zip_longest

from ..core.errors import ThriftError, did_you_mean
from ..core.method import MethodInfo, methods

KINDS = ("chat", "summarise", "edit", "qa", "maths", "translation")


@dataclass(frozen=True)
class KindPrompt:
    """A prompt of one of :data:`KINDS`; ``source`` says where its text comes from."""

    id: str
    kind: str
    prompt: str
    source: str


@cache
def all_prompts() -> tuple[KindPrompt, ...]:
    """The shipped prompts, kind by kind; see ``data/prompts/README.md`` for their licences."""
    text = files("tokenthrift").joinpath("data/prompts/prompts.jsonl").read_text(encoding="utf-8")
    return tuple(KindPrompt(**json.loads(line)) for line in text.split("\n") if line)


def load_prompts(per_kind: int | None = None, kinds: tuple[str, ...] = KINDS) -> list[KindPrompt]:
    """So many prompts of every kind, evenly spread over what there is; all when None.

    Kinds take turns, so that the first prompts are a fair sample too.

    Raises:
        ThriftError: an unknown kind, or a number below 1.
    """
    if per_kind is not None and per_kind < 1:
        raise ThriftError("there must be at least 1 prompt of every kind")
    chosen = []
    for kind in kinds:
        if kind not in KINDS:
            raise ThriftError(f"there are no prompts of the kind '{kind}': {did_you_mean(kind, KINDS)}")
        found = [p for p in all_prompts() if p.kind == kind]
        n = min(per_kind or len(found), len(found))
        chosen.append([found[i * len(found) // n] for i in range(n)])
    return [p for p in chain.from_iterable(zip_longest(*chosen)) if p is not None]


def exact_plans() -> list[str]:
    """A plan for every decode method with its defaults that leaves the output as it is and needs no second model.

    Lossy methods say so in their docstring, above the parameters; a method that needs a model, or a constraint, cannot
    be made without one.
    """
    return [f"decode={info.name}()" for info in methods("decode") if _is_exact(info) and _has_defaults(info)]


def _is_exact(info: MethodInfo) -> bool:
    said = (info.cls.__doc__ or "").split("Args:")[0]
    return not re.search(r"\blossy\b(?!\W+only)", said, re.IGNORECASE)


def _has_defaults(info: MethodInfo) -> bool:
    try:
        info.make()
    except ThriftError:
        return False
    return True
