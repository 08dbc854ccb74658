"""Runs the text stage: methods in sequence, their maps composed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ..core.errors import ThriftError
from ..core.plan import Step
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.tokens import count_tokens
from .compressed import CompressedText
from .spans import join, map_to_spans


def compress_text(
    methods: Sequence[Any],
    text: str,
    question: str | None,
    tokenizer: Any,
    scorer: Any = None,
    embedder: Any = None,
) -> CompressedText:
    """Apply text methods one after the other, each to what the one before it left.

    Args:
        methods: instances, as ``plan.at("text")`` gives them; none leaves the text as it is.
        text: the prompt.
        question: what will be asked about it, for methods that look at it.
        tokenizer: the fast tokenizer that defines what a token is.
        scorer, embedder: a ``Scorer`` and an ``Embedder``; or ``Lazy`` ones, made only if a method needs them.
    """
    if not isinstance(text, str):
        raise ThriftError(f"compress takes a text (str), not {type(text).__name__}")
    view = View(text=text, question=question, tokenizer=tokenizer, scorer=scorer, embedder=embedder)
    whole = TokenMap.identity(len(text))
    seconds = 0.0
    for method in methods:
        view.require(method.info.needs)
        for need in method.info.needs:
            getattr(view, need)  # models load before the clock runs
        if hasattr(method, "prepare"):
            method.prepare(view)  # so do those that a method was given by name
        start = time.perf_counter()
        step = method.reduce(view)
        seconds += time.perf_counter() - start
        whole = whole.then(step)
        view.offer("text", join(view.text, map_to_spans(step)))
    return CompressedText(
        text=view.text,
        original=text,
        kept=map_to_spans(whole),
        tokens_before=count_tokens(tokenizer, text),
        tokens_after=count_tokens(tokenizer, view.text),
        map=whole,
        seconds=seconds,
        method=" ".join(str(Step("text", method)) for method in methods),
    )
