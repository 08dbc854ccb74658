"""The four measurements of text_methods.py: continuation, questions, speed, structure. Each gives a row a rate."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenthrift.bench.data import default_data
from tokenthrift.bench.facts import Passage, answered
from tokenthrift.bench.fuzzed import Fuzzed, broken
from tokenthrift.bench.metrics import kl_divergence, nats_per_token, top1_agreement
from tokenthrift.bench.rates import AtRates
from tokenthrift.bench.tasks import pick, token_ends
from tokenthrift.text.protect import Protection
from tokenthrift.text.runtime import compress_text

Row = dict[str, Any]
POLICIES = {"published": None, "default": Protection.of("default")}
"""As in the papers, nothing is protected; and as ``tokenthrift.compress`` protects if it is not told otherwise."""
QUESTION = "What does the item return?"
"""Where any question will do."""


# ---- (a) continuation -----------------------------------------------------------------------------------------------


@dataclass
class Continued:
    """A text to shorten, what stands between it and its continuation, and what the model says along the latter."""

    context: str
    asked: str
    continuation: list[int]
    full: Tensor


def continued(
    model: Any, tokenizer: Any, documents: int, tokens: int, last: int = 32, tail: int = 48
) -> list[Continued]:
    """Pieces of the documentation that comes with Python; their last tokens stay, and are the question."""
    ends = token_ends(tokenizer)
    out = []
    for _, head, rest in pick(default_data().documents, ends, documents, tokens + last, tail, random.Random(0)):
        cut = ends(head)[-last - 1]
        ids = _ids(tokenizer, rest)
        out.append(Continued(head[:cut], head[cut:], ids, follow(model, tokenizer, head[:cut], head[cut:], ids)))
    return out


@torch.inference_mode()
def follow(model: Any, tokenizer: Any, context: str, asked: str, continuation: list[int]) -> Tensor:
    """Logits that predict each token of the continuation."""
    ids = [*_ids(tokenizer, context), *_ids(tokenizer, asked), *continuation]
    return model(torch.tensor([ids]), logits_to_keep=len(continuation) + 1).logits[0, :-1]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []


def continuation_rows(at: AtRates, texts: Sequence[Continued], model: Any) -> dict[float, Row]:
    """KL divergence and agreement of the next tokens behind the shorter text with those behind the whole one."""
    found: dict[float, list[tuple[float, ...]]] = {rate: [] for rate in at.methods}
    once = at.agrees(texts[0].context, texts[0].asked)
    for text in texts:
        for rate, _, out in at.compress(text.context, text.asked):
            logits = follow(model, at.models.tokenizer, out.text, text.asked, text.continuation)
            found[rate].append((*compared(text, logits), out.rate))
    names = ("kl", "top1", "nats", "kept")
    means = {rate: [statistics.mean(column) for column in zip(*rows, strict=True)] for rate, rows in found.items()}
    return {rate: {**dict(zip(names, values, strict=True)), "once": once} for rate, values in means.items()}


def without_context(texts: Sequence[Continued], model: Any, tokenizer: Any) -> float:
    """The same KL divergence where nothing of the texts is kept."""
    logits = [follow(model, tokenizer, "", text.asked, text.continuation) for text in texts]
    return statistics.mean(compared(text, found)[0] for text, found in zip(texts, logits, strict=True))


def compared(text: Continued, logits: Tensor) -> tuple[float, float, float]:
    """KL divergence, top-1 agreement, and nats a token of the true continuation."""
    tokens = torch.tensor(text.continuation)
    return kl_divergence(text.full, logits), top1_agreement(text.full, logits), nats_per_token(logits, tokens)


# ---- (b) questions --------------------------------------------------------------------------------------------------


def question_rows(at: AtRates, passages: Sequence[Passage], asks: bool) -> dict[float, Row]:
    """Is the answer still there? Of every question 1 or 0, in the order of the passages; and its kind.

    What does not look at the question shortens a passage once. Under the default policy answers with something in them
    that is protected by itself are left out (None): they are no merit of the method.
    """
    longest = max(passages, key=lambda passage: len(passage.text))
    once = at.agrees(longest.text, longest.questions[0].text, tuple(POLICIES.values()))
    rows: dict[float, Row] = {rate: {"once": once} for rate in at.methods}
    for row in rows.values():
        for name in POLICIES:
            row |= {f"{name}_hits": [], f"{name}_kept": []}
    for passage in passages:
        outs: list[Any] = []
        for i, question in enumerate(passage.questions):
            if asks or i == 0:
                outs = list(at.compress(passage.text, question.text, tuple(POLICIES.values())))
            free = not is_protected(passage.text, question.answer)
            for (rate, policy, out), name in zip(outs, [*POLICIES] * len(rows), strict=True):
                assert list(POLICIES)[policy] == name
                hit = int(answered(out.text, question.answer)) if free or name == "published" else None
                rows[rate][f"{name}_hits"].append(hit)
                rows[rate][f"{name}_kept"].append(round(out.rate, 4))
    return rows


def is_protected(text: str, answer: str) -> bool:
    """Whether anything of where the answer stands is protected by default; where it is not found as it is, too."""
    start = text.find(answer)
    end = start + len(answer)
    return start < 0 or any(p.start < end and start < p.end for p in POLICIES["default"].find(text))


# ---- (c) speed ------------------------------------------------------------------------------------------------------


def speed_rows(at: AtRates, texts: Sequence[str]) -> dict[float, Row]:
    """Tokens a second of whole calls, each rate by itself, after one that loads and warms up."""
    rows = {}
    for rate, method in at.methods.items():
        compress_text([method], texts[0][:400], QUESTION, *at.models)
        outs = [compress_text([method], text, QUESTION, *at.models) for text in texts]
        rows[rate] = {"speed": statistics.median(out.tokens_before / max(out.seconds, 1e-9) for out in outs)}
    return rows


def timed_texts(tokenizer: Any, count: int, tokens: int) -> list[str]:
    """Pieces of the documentation."""
    pieces = pick(default_data().documents, token_ends(tokenizer), count, tokens, 4, random.Random(1))
    return [head for _, head, _ in pieces]


# ---- (d) structure --------------------------------------------------------------------------------------------------

CHECKED = {"default": Protection.of("default"), "structure": Protection.of("structure")}


def structure_rows(at: AtRates, documents: Sequence[Fuzzed]) -> dict[float, Row]:
    """What was broken, by policy and kind; and how many documents came back as they were because something failed."""
    policies = tuple(CHECKED.values())
    once = at.agrees(max(documents, key=lambda doc: len(doc.text)).text, QUESTION, policies)
    wrong: dict[float, dict[str, Counter[str]]] = {r: {name: Counter() for name in CHECKED} for r in at.methods}
    unchanged: Counter[float] = Counter()
    planted: Counter[str] = Counter()
    for doc, these in _with_policies(documents):
        planted += Counter(p.kind for p in doc.planted)
        for rate, i, out in at.compress(doc.text, QUESTION, these):
            name, policy = list(CHECKED.items())[i]
            wrong[rate][name] += broken(doc, out.kept, policy.kinds)
            assert all(doc.text[a:b] in out.text for a, b in out.kept)
            unchanged[rate] += any("returned as it was" in note for note in out.notes)
    return {
        rate: {"broken": {name: dict(found) for name, found in wrong[rate].items()}, "planted": dict(planted)}
        | {"documents": len(documents), "unchanged": unchanged[rate], "once": once}
        for rate in at.methods
    }


def _with_policies(documents: Sequence[Fuzzed]) -> Iterator[tuple[Fuzzed, Sequence[Protection]]]:
    """The default protects every kind; the other policy is tried on every fourth document."""
    policies = tuple(CHECKED.values())
    for i, doc in enumerate(documents):
        yield doc, policies if i % 4 == 0 else policies[:1]
