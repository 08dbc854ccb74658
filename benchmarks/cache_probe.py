"""What both sides of `cache_methods.py` measure, with nothing but torch and transformers.

As a script it is the peer: jobs come as JSON lines on standard input, results leave as JSON lines. It runs in an
environment of its own (`kvpress==0.5.5` needs transformers < 5.3).
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def probe(
    model: Any,
    ids: list[int],
    text: list[int],
    facts: list[tuple[list[int], list[int]]],
    reference: Tensor | None = None,
    compress: Callable[[], AbstractContextManager[Any]] = nullcontext,
    positions: bool = False,
) -> dict[str, Any]:
    """Read a prompt, follow the text token by token, ask questions; each from a copy of the prompt's cache.

    Args:
        text: how the prompt goes on.
        facts: question and answer each: what part of the answers greedy decoding would give.
        reference: ``(text, vocabulary)`` log-probabilities of the unmodified model.
        compress: entered while the prompt is read.
        positions: give position ids, for a cache that does not know how many tokens it has seen.

    Returns:
        ``ttft`` in seconds, ``bytes`` of keys and values, ``kl`` and ``top1`` to the reference, ``score`` of the
        questions, ``logp`` as ``reference``; ``keys``, for every layer and head the sum of its keys, which is the same
        where the same entries are kept, in whatever order; ``cache`` after the prompt.
    """
    prompt = torch.tensor([ids])
    start = perf_counter()
    with compress():
        out = model(prompt, use_cache=True, logits_to_keep=1)
    ttft, kept, seen = perf_counter() - start, out.past_key_values, len(ids)

    step = partial(forward, model, positions)

    cache, logits = deepcopy(kept), [out.logits[0, -1]]
    for i, token in enumerate(text):
        logits.append(step(cache, [token], seen + i)[0, -1])
    logp = torch.stack(logits[:-1]).float().log_softmax(-1)

    found = 0
    for question, answer in facts:
        cache, at = deepcopy(kept), seen
        step(cache, question[:-1], at)
        at += len(question) - 1
        token, right = question[-1], 0
        for want in answer:
            if int(step(cache, [token], at)[0, -1].argmax()) != want:
                break
            token, at, right = want, at + 1, right + 1
        found += right == len(answer)

    size = sum(getattr(layer, "nbytes", 0) or layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)
    result = {"ttft": ttft, "bytes": size, "logp": logp, "cache": kept}
    result["keys"] = [layer.keys.sum(2).flatten(0, 1).tolist() for layer in kept.layers]
    if facts:
        result["score"] = found / len(facts)
    if reference is not None:
        result["kl"] = float((reference.exp() * (reference - logp)).sum(-1).mean())
        result["top1"] = float((reference.argmax(-1) == logp.argmax(-1)).float().mean())
    return result


def forward(model: Any, positions: bool, cache: Any, tokens: list[int], at: int) -> Tensor:
    """Logits of the last of these tokens, which stand at ``at`` and after."""
    where = {"position_ids": torch.arange(at, at + len(tokens))[None]} if positions else {}
    return model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1, **where).logits


@torch.no_grad()
def pace(model: Any, cache: Any, text: list[int], seen: int, positions: bool = False) -> float:
    """Seconds that a token takes to decode after a prompt of ``seen`` tokens, the first two not counted: median."""
    cache, times = deepcopy(cache), []
    for i, token in enumerate(text):
        start = perf_counter()
        forward(model, positions, cache, [token], seen + i)
        times.append(perf_counter() - start)
    return statistics.median(times[2:])


def serve() -> None:
    """Answer jobs until standard input ends."""
    import kvpress
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.logging.disable_progress_bar()
    hello = json.loads(sys.stdin.readline())
    torch.set_num_threads(hello["threads"])
    model = AutoModelForCausalLM.from_pretrained(hello["model"], dtype=torch.float32).eval()
    print(json.dumps({"transformers": transformers.__version__}), file=sys.__stdout__, flush=True)
    cache = None
    for line in sys.stdin:
        job = json.loads(line)
        if "pace" in job:  # once more with the cache of the last job
            seconds = pace(model, cache, job["pace"], job["seen"], positions=True)
            print(json.dumps({"decode": seconds}), file=sys.__stdout__, flush=True)
            continue
        press = eval(job["press"], vars(kvpress))
        model.set_attn_implementation("eager" if isinstance(press, kvpress.ObservedAttentionPress) else "sdpa")
        reference, compress = torch.load(job["reference"]), partial(press, model)
        result = probe(model, job["ids"], job["text"], [], reference, compress, positions=True)
        cache = result.pop("cache")
        del result["logp"]
        print(json.dumps(result), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no result
    serve()
