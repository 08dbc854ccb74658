"""What the public names do: wire plans, adapters, packs and the text stage together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .core.plan import Plan
from .core.session import Session


def apply(plan: Plan | str | os.PathLike[str] | Mapping[str, Any] | None, model: Any, processor: Any = None) -> Session:
    """A session that runs ``plan`` inside its ``with`` block, on the model itself: nothing is forked or copied.

    Args:
        plan: a Plan, text such as ``"cache=snapkv(budget=512)"``, a mapping, the path of a plan.yaml, or None.
        model: any supported ``transformers`` model.
        processor: its tokenizer, needed only by plans with a text stage (for ``session.compress``).

    Raises:
        ThriftError: unknown method, parameter or stage, or a model that no adapter fits.
    """
    from .models.adapters import adapter_for

    return Session(Plan.of(plan), adapter_for(model))
