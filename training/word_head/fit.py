"""Fitting a word head to labels, the encoder frozen: its hidden states are computed once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenthrift.core.errors import ThriftError
from tokenthrift.models.word_head import WordHead, WordScorer, surface
from tokenthrift.text.spans import words

NEAR = 4
"""Tokens right behind a removed word that do not count: the broken grammar surprises, whatever the word said."""
LEAST = 12
"""Tokens behind a removed word below which its label is left out: too near the passage's end."""
HIGHEST = 12.0
"""Nats a token beyond which costs count the same."""


@dataclass(frozen=True)
class Example:
    """A passage: what the head reads of its words, and what it shall say; labels that are missing are not a number."""

    states: Tensor
    features: Tensor
    costs: Tensor


@dataclass(frozen=True)
class Fitted:
    """Held-out loss of every epoch, the best epoch, rank correlations of both costs on held-out passages, labels."""

    losses: list[float]
    best: int
    own: float
    later: float
    words: int
    removed: int


def read_labels(path: Path) -> list[dict[str, Any]]:
    """The lines that ``make_labels.py`` wrote.

    Raises:
        ThriftError: there is no such file, or a line is none of its.
    """
    if not path.is_file():
        raise ThriftError(f"there is no file {path}: make labels with make_labels.py first")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            if len(words(row["text"])) != len(row["words"]):
                raise ValueError("its words are not those of its text")
        except (ValueError, KeyError, TypeError) as error:
            raise ThriftError(f"{path.name}, line {number} holds no labels ({error}): make them again") from None
        rows.append(row)
    return rows


def examples(rows: Sequence[dict[str, Any]], scorer: WordScorer) -> list[Example]:
    """What the head of ``scorer`` reads, beside the labels as costs a token."""
    found = []
    for row in rows:
        units = words(row["text"])
        costs = torch.full((len(units), 2), torch.nan)
        for i, (tokens, own, later) in enumerate(row["words"]):
            if tokens:
                costs[i, 0] = min(own / tokens, HIGHEST)
                if len(later) >= LEAST:
                    costs[i, 1] = max(min(sum(later[NEAR:]) / tokens, HIGHEST), -1.0)
        found.append(Example(scorer.states(row["text"], units)[0], surface(row["text"], units), costs))
    return found


def fit(
    head: WordHead, learned: Sequence[Example], tested: Sequence[Example], *, epochs: int, lr: float, seed: int
) -> Fitted:
    """Train in place; in the end the head has the weights of the epoch that was best on ``tested``."""
    torch.manual_seed(seed)
    known = torch.cat([e.costs for e in learned])
    scale = torch.stack([known[~known[:, i].isnan(), i].std() for i in range(2)])
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(learned))
    losses: list[float] = []
    best: dict[str, Tensor] = {}
    for _ in range(epochs):
        head.train()
        for i in torch.randperm(len(learned)).tolist():
            loss = _loss(head, learned[i], scale)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        head.eval()
        with torch.inference_mode():
            losses.append(float(torch.stack([_loss(head, e, scale) for e in tested]).mean()))
        if losses[-1] == min(losses):
            best = {name: value.detach().clone() for name, value in head.state_dict().items()}
    head.load_state_dict(best)
    own, later = (rank_correlation(head, tested, i) for i in range(2))
    counts = (~known.isnan()).sum(0).tolist()
    return Fitted(losses, losses.index(min(losses)), own, later, *counts)


def _loss(head: WordHead, example: Example, scale: Tensor) -> Tensor:
    costs = head(example.states, example.features)
    there = ~example.costs.isnan()
    wrong = torch.nn.functional.smooth_l1_loss(
        (costs / scale)[there], (example.costs / scale)[there], reduction="none", beta=1.0
    )
    # Removed words are fewer, and weigh as much together.
    share = there.float() / there.sum(0).clamp(min=1)
    return (wrong * share[there]).sum()


@torch.inference_mode()
def rank_correlation(head: WordHead, tested: Sequence[Example], which: int) -> float:
    """Spearman's, the mean over passages."""
    found = []
    for example in tested:
        there = ~example.costs[:, which].isnan()
        if there.sum() > 2:
            said = head(example.states, example.features)[there, which]
            ranks = torch.stack([said.argsort().argsort(), example.costs[there, which].argsort().argsort()]).double()
            found.append(torch.corrcoef(ranks)[0, 1])
    return float(torch.stack(found).mean()) if found else float("nan")
