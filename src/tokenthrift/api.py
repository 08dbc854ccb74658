"""What the public names do: wire plans, adapters, packs and the text stage together."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, overload

from .core.errors import ThriftError
from .core.method import find
from .core.plan import Plan
from .core.session import Session
from .core.view import Lazy

if TYPE_CHECKING:
    from .bench.runner import BenchResult
    from .bench.tuning import TuneResult
    from .models.scoring import Embedder, Scorer
    from .text.compressed import CompressedText
    from .text.messages import CompressedMessages


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


@overload
def compress(
    text: str,
    method: str = ...,
    rate: float | int | None = ...,
    question: str | None = ...,
    **options: Any,
) -> CompressedText: ...


@overload
def compress(
    text: list[str] | tuple[str, ...],
    method: str = ...,
    rate: float | int | None = ...,
    question: str | Sequence[str | None] | None = ...,
    **options: Any,
) -> list[CompressedText]: ...


def compress(
    text: str | Sequence[str],
    method: str = "word_head",
    rate: float | int | None = None,
    question: str | Sequence[str | None] | None = None,
    *,
    tokens: int | None = None,
    price: float | None = None,
    spend: float | None = None,
    protect: Any = "default",
    min_saving: int | float = 0,
    max_loss: float | None = None,
    chunk: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    tokenizer: Any = None,
    scorer: Scorer | tuple[Any, Any] | None = None,
    embedder: Embedder | tuple[Any, Any] | None = None,
    **params: Any,
) -> CompressedText | list[CompressedText]:
    """Shorten a prompt to a share of its tokens, with spans of the original only.

    The result is checked before it is returned: it is made of whole spans of the text, and what ``protect`` names is
    in it, byte for byte. Where that cannot be had the text comes back as it was, and ``notes`` of the result say why.

    Args:
        text: the prompt; or a list of prompts, each of which gets a result of its own.
        method: name of a text method (``tokenthrift methods --stage text``). The default, a small head on the
            minilm-l6 pack, needs neither a question nor a language model; take ``embedding_sentences`` with a question.
        rate: share of the tokens to keep, in (0, 1]; an int is a number of tokens. Where no target is given, what the
            method does by default, which is 0.5 for most.
        question: what will be asked about the text, for methods that look at it; for a list one for all, or a list.
        tokens: another way to give a target: how many tokens to keep.
        price, spend: another way: what a million tokens cost, and what the text may cost.
        protect: what must survive: ``"default"``, ``"structure"``, ``"none"``, kinds such as ``"code,json,number"`` or
            ``"default,-quote"``, or a list that may hold compiled patterns too; see
            :class:`tokenthrift.text.protect.Protection`. Protected spans are kept first. If they alone exceed the
            target they win: only they are kept, and the notes say so. With ``"default,whole"`` the target wins: some
            are left out, but none is broken.
        min_saving: return the text as it was if less would be saved: a number of tokens, or as a float a share. What
            the target cannot save is not even tried.
        max_loss: return the text as it was if the predicted loss is larger, in [0, 1].
        chunk: score so many tokens at a time, for methods whose time grows faster than the text or that shall show
            their progress. The choice is still one over the whole text.
        progress: called with tokens done and tokens in all after every chunk; for a list, with texts.
        tokenizer: what defines a token: a fast tokenizer, a ``tiktoken`` encoding, or a name: a model pack, folder or
            hub id, or ``"tiktoken:gpt-4o"``. The scorer's when None.
        scorer: a ``Scorer`` or (causal language model, tokenizer); the smollm2-135m pack when None.
        embedder: an ``Embedder`` or (encoder, tokenizer); the minilm-l6 pack when None. Like the scorer's, the default
            is loaded once, and only for methods that need it.
        params: more parameters of the method, e.g. ``level="sentence"``.

    Raises:
        ThriftError: unknown method, parameter or kind, a target outside its range, or a text that is no text.
    """
    from .models.scoring import Embedder, Scorer
    from .text.protect import Protection
    from .text.runtime import compress_text

    made = _text_method(method, target_of(rate, tokens, price, spend), params)
    policy = Protection.of(protect)
    if isinstance(scorer, tuple):
        scorer = Scorer(*scorer)
    if isinstance(embedder, tuple):
        embedder = Embedder(*embedder)
    tokenizer = _tokenizer(tokenizer, scorer)

    def one(text: Any, question: Any, progress: Any = None) -> CompressedText:
        return compress_text(
            [made],
            text,
            question,
            tokenizer,
            scorer=scorer or Lazy(load_scorer),
            embedder=embedder or Lazy(load_embedder),
            protect=policy,
            min_saving=min_saving,
            max_loss=max_loss,
            chunk=chunk,
            progress=progress,
        )

    if not isinstance(text, list | tuple):
        return one(text, question, progress)
    if any(isinstance(item, Mapping) for item in text):
        raise ThriftError("these are chat messages: use tokenthrift.compress_messages(messages, ...)")
    questions = [question] * len(text) if isinstance(question, str | None) else list(question)
    if len(questions) != len(text):
        raise ThriftError(f"{len(text)} texts and {len(questions)} questions: give one question, or one a text")
    results = []
    for i, (item, asked) in enumerate(zip(text, questions, strict=True)):
        results.append(one(item, asked))
        if progress is not None:
            progress(i + 1, len(text))
    return results


def compress_messages(
    messages: Sequence[Mapping[str, Any]],
    method: str = "word_head",
    rate: float | None = None,
    question: str | None = None,
    *,
    roles: Sequence[str] | str | None = None,
    keep_last: int | None = None,
    skip_below: int = 64,
    append_only: bool = False,
    tokens: int | None = None,
    price: float | None = None,
    spend: float | None = None,
    tokenizer: Any = None,
    scorer: Scorer | tuple[Any, Any] | None = None,
    **options: Any,
) -> CompressedMessages:
    """Shorten the texts in chat messages; roles, tool calls, images and everything else stay as they are.

    Args:
        messages: ``{"role": ..., "content": ...}``; the content is a text, a list of parts of which the texts are
            shortened, or None. Parts with ``cache_control`` are left alone. What is given is never changed.
        method: see :func:`compress`.
        rate: share of the tokens to keep of every text; an int is a number of tokens for all texts together.
        question: what methods that look at one get; the last user turn when None.
        roles: whose messages are shortened: ``user``, ``assistant``, ``tool`` and ``function``, so that system prompts
            stay as they are unless they are named.
        keep_last: how many user turns at the end stay as they are; 1 by default.
        skip_below: texts with fewer tokens stay as they are.
        append_only: every message is shortened by a rule that looks at nothing but this message. What a turn became
            never changes when later turns come, so that a provider's prompt cache keeps hitting. As any user turn was
            the last one once, user turns then stay as they are, unless ``roles`` names them.
        tokens, price, spend: a target for all texts of all messages, those that stay included.
        tokenizer, scorer: see :func:`compress`.
        options: further arguments of :func:`compress`: ``protect``, ``min_saving``, parameters of the method.

    Raises:
        ThriftError: as :func:`compress`, or the messages are not built like that.
    """
    from .ops.tokens import count_tokens
    from .text.messages import compress_messages as run

    target = target_of(rate, tokens, price, spend)
    if isinstance(scorer, tuple):
        from .models.scoring import Scorer

        scorer = Scorer(*scorer)
    counts = _tokenizer(tokenizer, scorer)

    def shorten(text: str, target: float | int | None, question: str | None) -> CompressedText:
        return compress(text, method, target, question, tokenizer=counts, scorer=scorer, **options)

    return run(
        messages,
        shorten,
        lambda text: count_tokens(counts, text),
        target,
        question,
        roles=roles,
        keep_last=keep_last,
        skip_below=skip_below,
        append_only=append_only,
    )


async def acompress(text: Any, *args: Any, **kwargs: Any) -> Any:
    """:func:`compress`, or :func:`compress_messages` for a list of messages, in a thread: the event loop goes on.

    Calls run one after the other, as each takes all cores, and a tokenizer serves one thread at a time.
    """
    import asyncio

    messages = isinstance(text, list | tuple) and any(isinstance(item, Mapping) for item in text)

    def work() -> Any:
        with _one_at_a_time:
            return (compress_messages if messages else compress)(text, *args, **kwargs)

    return await asyncio.to_thread(work)


_one_at_a_time = threading.Lock()


def target_of(rate: Any = None, tokens: Any = None, price: Any = None, spend: Any = None) -> float | int | None:
    """The target of a compression; see :func:`tokenthrift.text.targets.budget_of`."""
    from .text.targets import budget_of

    return budget_of(rate, tokens, price, spend)


def _text_method(name: str, target: float | int | None, params: dict[str, Any]) -> Any:
    return find(name, "text").make(**({} if target is None else {"rate": target}), **params)


def _tokenizer(given: Any, scorer: Scorer | None) -> Any:
    """What counts tokens: what was given, by name or as such, or the scorer's own."""
    from .ops.tokens import as_tokenizer

    if given is None:
        return (scorer or load_scorer()).tokenizer
    return load_tokenizer(given) if isinstance(given, str) else as_tokenizer(given)


@cache
def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model pack, folder or hub id, or of ``tiktoken:NAME``; loaded once."""
    if name.startswith("tiktoken:"):
        from .ops.tokens import load_tiktoken

        return load_tiktoken(name.removeprefix("tiktoken:"))
    from .models.packs.spec import PACKS

    if name in PACKS:
        return load_scorer(name).tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises nearly every type for bad names and files
        said = str(error).strip().split("\n")[0]
        raise ThriftError(f"cannot load the tokenizer '{name}': {said}") from None


def _compressor(model: Any, tokenizer: Any) -> Callable[..., CompressedText]:
    """What a session compresses with: its own model scores, its own tokenizer counts."""
    from .models.scoring import Scorer
    from .text.runtime import compress_text

    own_scorer = cache(lambda: Scorer(model, tokenizer))

    def compressor(methods: list[Any], text: str, question: str | None, protect: Any = None) -> CompressedText:
        from .text.protect import Protection

        policy = None if protect is None else Protection.of(protect)
        return compress_text(methods, text, question, tokenizer, Lazy(own_scorer), Lazy(load_embedder), protect=policy)

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
