"""The plans to compare: the default sets, and reading the user's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from ..core.errors import ThriftError
from ..core.plan import Plan, file_text, load_yaml

LANGUAGE = (
    "cache=snapkv(budget=0.75)",
    "cache=snapkv(budget=0.5)",
    "cache=snapkv(budget=0.25)",
    "cache=knorm(budget=0.75)",
    "cache=streaming_llm(budget=0.75)",
    "text=truncate(rate=0.75)",
    "text=word_head(rate=0.75)",
    "text=embedding_sentences(rate=0.75)",
    "decode=prompt_lookup()",
    "text=embedding_sentences(rate=0.75) cache=snapkv(budget=0.5) decode=prompt_lookup()",
)
"""For language models: each stage alone, then together. Shares, not counts, to fit prompts of any length."""

VISION = (
    *(f"vision=tome(keep={keep})" for keep in (0.8, 0.6, 0.4, 0.25)),
    *(
        f"vision={name}(keep=0.4)"
        for name in ("pitome", "mctf", "diffrate", "tofu", "evit", "tps", "dpc_knn", "token_transforming")
    ),
    "vision=tomesd(ratio=0.5)",
)
"""For vision encoders: one method from careful to aggressive, then others at one share."""

VISUAL = (
    *(f"connector={name}(keep=0.25, positions=original)" for name in ("random_tokens", "pool_tokens")),
    "connector=uniform_tokens(keep=0.25, positions=original, grid=True)",
    *(f"connector=divprune(keep={keep}, positions=original)" for keep in (0.5, 0.25, 0.11)),
    "connector=divprune(keep=0.25)",
    *(f"connector={name}(keep=0.25, positions=original)" for name in ("visionzip", "hiprune")),
    "prefill=fastv(keep=0.25)",
)
"""For vision-language models: the baselines at one share, a method from careful to aggressive, others at that share.
Tokens keep their positions: many of the shipped questions ask for places. One plan shows what gapless ones cost."""

DEFAULTS = {"language": LANGUAGE, "vision": VISION, "visual": VISUAL}
"""By kind of model."""


def kind_of(plan: Plan) -> str:
    """The kind of model that a plan is measured on where none is named."""
    if plan and set(plan.stages) == {"vision"}:
        return "vision"
    family = [step.info.cls.__module__.split(".")[-2] for step in plan]
    return "visual" if "connector" in plan.stages or "multimodal" in family else "language"


def read_plans(values: Iterable[Plan | str | os.PathLike[str] | Mapping[str, Any]]) -> list[Plan]:
    """Plans from plan texts, YAML files (one plan, or a list of plans) and Plan objects; duplicates are dropped.

    The empty plan is left out: the unmodified model always takes part.
    """
    plans = [p for value in values for p in _read(value)]
    found = list(dict.fromkeys(p for p in plans if p))
    if not found:
        raise ThriftError("no plan to compare: give at least one, such as --plans 'cache=snapkv(budget=512)'")
    return found


def _read(value: Any) -> list[Plan]:
    text = file_text(value)
    if text is None:
        return [Plan.of(value)]
    data = load_yaml(text, os.fspath(value))
    return [Plan.of(item) for item in data] if isinstance(data, list) else [Plan.of(data)]
