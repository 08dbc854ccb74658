"""The decode stage of decoder-only models: the user's own ``model.generate`` drafts and verifies."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any

from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from ..core.errors import ThriftError
from ..core.session import Session
from ..decoding.engine import DecodeStats, speculate
from ..decoding.protocols import each_row

_MARK = "_tokenthrift_decode"


def install_decode(adapter: Any, method: Any, session: Session, undo: ExitStack) -> None:
    """Make ``model.generate`` decode with the drafts of ``method``; ``undo`` takes the change back, without a trace.

    The model gets an attribute ``generate`` of its own that calls the one it had with ``custom_generate``; all other
    arguments stay the user's. Records stage ``decode``: tokens before = tokens committed (the forwards of plain
    decoding), after = forwards (prefill included), seconds = drafting and verification.

    Raises:
        ThriftError: the model has a decode stage already; and when called, ``generate`` raises it for arguments that
            ask for another way of decoding (see :func:`tokenthrift.decoding.engine.speculate`).
    """
    model = adapter.model
    plain = model.generate
    if hasattr(plain, _MARK):
        raise ThriftError(
            f"this {type(model).__name__} already has a decode stage: leave the with block of that session first"
        )
    signature = inspect.signature(plain)

    @wraps(plain)
    def generate(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        given = {**call.arguments, **call.arguments.get("kwargs", {})}
        for name in ("custom_generate", "assistant_model", "prompt_lookup_num_tokens"):
            if given.get(name) is not None:
                raise ThriftError(
                    f"generate({name}=...) conflicts with the plan's decode={method.info.name}(): use one"
                )
        if given.get("synced_gpus"):
            raise ThriftError("drafts do not work with synced_gpus: processes would disagree on the number of forwards")
        _pass_stop_strings(model, call, given)
        # generate hands a custom function no streamer, so it is bound here; generate itself streams the prompt.
        streamer = given.get("streamer")
        how: dict[str, Any] = {"streamer": streamer, "on_done": partial(_record, session)}
        if hasattr(method, "decode"):  # a loop of its own
            decode: Any = partial(method.decode, processor=session.processor, **how)
        else:
            decode = partial(
                speculate,
                start=getattr(method, "start_batch", None) or each_row(method.start),
                rule=getattr(method, "rule", "sample"),
                tokenizer=getattr(session.processor, "tokenizer", session.processor),
                on_step=getattr(streamer, "on_step", None),
                **how,
            )
        call.arguments["custom_generate"] = decode
        return plain(*call.args, **call.kwargs)

    setattr(generate, _MARK, True)
    own = "generate" in vars(model)
    undo.callback(partial(setattr, model, "generate", plain) if own else partial(delattr, model, "generate"))
    model.generate = generate


def _pass_stop_strings(model: Any, call: inspect.BoundArguments, given: dict[str, Any]) -> None:
    """Turn stop strings into a stopping criterion: generate loses the tokenizer that they need on its way to a
    custom function."""
    base = given.get("generation_config") or model.generation_config
    stop = given.get("stop_strings") or getattr(base, "stop_strings", None)
    if stop is None or given.get("tokenizer") is None:
        return  # without a tokenizer, generate says what is missing
    criterion = StopStringCriteria(stop_strings=stop, tokenizer=given["tokenizer"])
    call.arguments["stopping_criteria"] = StoppingCriteriaList([*(given.get("stopping_criteria") or ()), criterion])
    call.arguments["kwargs"] = {**call.arguments.get("kwargs", {}), "stop_strings": None}


def _record(session: Session, stats: DecodeStats) -> None:
    """Add one call to the session's totals."""
    record = session.record(
        "decode",
        before=stats.committed,
        after=stats.forwards,
        seconds=stats.draft_seconds + stats.verify_seconds,
    )
    extra = record.extra
    for name in ("drafts", "drafted", "accepted", "prefill_seconds", "draft_seconds", "verify_seconds"):
        extra[name] = extra.get(name, 0) + getattr(stats, name)
    for name, value in stats.extra.items():
        extra[name] = extra.get(name, 0) + value
    # Tokens a forward commits after the prefill, which commits one a call: accepted ones and the model's own.
    steps = record.tokens_after - record.calls
    extra["mean_accepted_length"] = (record.tokens_before - record.calls) / steps if steps else 0.0
    for source, counts in stats.by_source.items():
        record.tally("source", source, *counts)
    for depth, counts in enumerate(stats.by_depth, start=1):
        record.tally("depth", str(depth), *counts)
