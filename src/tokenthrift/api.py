"""What the public names do: wire plans, adapters, packs and the text stage together."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from .core.method import find
from .core.plan import Plan
from .core.session import Session
from .core.view import Lazy

if TYPE_CHECKING:
    from .bench.runner import BenchResult
    from .bench.tuning import TuneResult
    from .models.scoring import Embedder, Scorer
    from .text.compressed import CompressedText


def apply(
    plan: Plan | str | os.PathLike[str] | Mapping[str, Any] | None,
    model: Any,
    processor: Any = None,
    *,
    linears: str = "auto",
) -> Session:
    """A session that runs ``plan`` inside its ``with`` block, on the model itself: nothing is forked or copied.

    Args:
        plan: a Plan, text such as ``"cache=snapkv(budget=512)"``, a mapping, the path of a plan.yaml, or None.
        model: any supported ``transformers`` model.
        processor: its tokenizer, needed only by plans with a text stage (for ``session.compress``) and by methods that
            look at words.
        linears: the product that linear layers take while the session lasts, for float32 models on a CPU: ``"torch"``,
            ``"onednn"``, or ``"prepacked"``, which is the fastest and takes the weights' memory once more. ``"auto"``
            changes nothing but with a decode stage, whose forwards of a few tokens oneDNN can make much shorter: then
            the faster of the first two on this machine. See :mod:`tokenthrift.models.linears`.

    Raises:
        ThriftError: unknown method, parameter or stage, or a model that no adapter fits, or ``linears`` that it
            cannot have.
    """
    from .models.adapters import adapter_for

    compressor = None if processor is None else _compressor(model, getattr(processor, "tokenizer", processor))
    return Session(Plan.of(plan), adapter_for(model), compressor, processor, linears)


def compress(
    text: str,
    method: str = "selective_context",
    rate: float = 0.5,
    question: str | None = None,
    *,
    tokenizer: Any = None,
    scorer: Scorer | tuple[Any, Any] | None = None,
    embedder: Embedder | tuple[Any, Any] | None = None,
    **params: Any,
) -> CompressedText:
    """Shorten a prompt to a share of its tokens, with spans of the original only.

    Args:
        text: the prompt.
        method: name of a text method (``tokenthrift methods --stage text``). The default, Selective Context, needs
            neither a question nor a trained compressor; ``embedding_sentences`` is the one to take with a question.
        rate: share of the tokens to keep, in (0, 1]; an int is a number of tokens.
        question: what will be asked about the text, for methods that look at it.
        tokenizer: the fast tokenizer that defines what a token is; the scorer's when None.
        scorer: a ``Scorer`` or (causal language model, tokenizer); the smollm2-135m pack when None.
        embedder: an ``Embedder`` or (encoder, tokenizer); the minilm-l6 pack when None. Like the scorer's, the default
            is loaded once, and only for methods that need it.
        params: more parameters of the method, e.g. ``level="sentence"``.

    Raises:
        ThriftError: unknown method or parameter, a rate outside (0, 1], or a text that is no text.
    """
    from .models.scoring import Embedder, Scorer
    from .text.runtime import compress_text

    made = find(method, "text").make(rate=rate, **params)
    if isinstance(scorer, tuple):
        scorer = Scorer(*scorer)
    if isinstance(embedder, tuple):
        embedder = Embedder(*embedder)
    if tokenizer is None:
        tokenizer = load_scorer().tokenizer if scorer is None else scorer.tokenizer
    return compress_text(
        [made],
        text,
        question,
        tokenizer,
        scorer=scorer or Lazy(load_scorer),
        embedder=embedder or Lazy(load_embedder),
    )


def _compressor(model: Any, tokenizer: Any) -> Callable[..., CompressedText]:
    """What a session compresses with: its own model scores, its own tokenizer counts."""
    from .models.scoring import Scorer
    from .text.runtime import compress_text

    own_scorer = cache(lambda: Scorer(model, tokenizer))

    def compressor(methods: list[Any], text: str, question: str | None) -> CompressedText:
        return compress_text(methods, text, question, tokenizer, Lazy(own_scorer), Lazy(load_embedder))

    return compressor


@cache
def load_scorer(name: str = "smollm2-135m") -> Scorer:
    """The scorer of a model pack, folder or hub id; loaded once."""
    from .models.packs import load
    from .models.scoring import Scorer

    return Scorer(*load(name))


@cache
def load_embedder(name: str = "minilm-l6") -> Embedder:
    """The embedder of a model pack, folder or hub id; loaded once."""
    from .models.packs import load
    from .models.scoring import Embedder

    return Embedder(*load(name))


def bench(*args: Any, **kwargs: Any) -> BenchResult:
    """Compare plans with the unmodified model; see :func:`tokenthrift.bench.runner.bench`, whose arguments it takes."""
    from .bench.runner import bench as run

    return run(*args, **kwargs)


def tune(*args: Any, **kwargs: Any) -> TuneResult:
    """Spread a plan's budget over the layers; see :func:`tokenthrift.bench.tuning.tune`, whose arguments it takes."""
    from .bench.tuning import tune as run

    return run(*args, **kwargs)
