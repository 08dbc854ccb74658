"""Token-level compression in steps: equal to the authors' code where that is asked for, sound where it is not."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tokenthrift.text.documents import arranged, rate_changes, within_budget
from tokenthrift.text.iterative import above_quantile, authors_kept, authors_schedule, authors_threshold, margins

GOLDEN = Path(__file__).parents[1] / "golden" / "text"
FILE = np.load(GOLDEN / "llmlingua_itpc.npz")
TABLE = torch.from_numpy(FILE["table"])
CASES: list[dict[str, Any]] = json.loads(str(FILE["meta"]))
BUDGET = np.load(GOLDEN / "llmlingua_context_budget.npz")


def surprise(ids: list[int], last: int) -> Tensor:
    """The stub of the golden file: a state that halves with every token, plus a row of a table."""
    state, losses = torch.zeros(40), []
    for token, following in pairwise(ids):
        state = 0.5 * state + TABLE[token]
        losses.append(cross_entropy(state, torch.tensor(following)))
    return torch.stack(losses)[len(losses) - last :]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_the_authors_decisions(case: dict[str, Any]) -> None:
    start, size = case["start"], case["iterative_size"]
    ids = FILE[f"{case['name']}_in"].tolist()
    lengths = [n + 2 for n in case["context_lengths"][bool(start) :]]
    schedule = authors_schedule(lengths, case["target"], size, case["dynamic_ratio"] or [0.0] * len(lengths))
    assert [[list(part) for part in parts] for parts in schedule] == case["schedule"]
    keep = None
    if case["keep_split"]:
        keep = [t == 13 and 13 in (*ids[max(i - 1, 0) : i], *ids[i + 1 : i + 2]) for i, t in enumerate(ids)]
    alone = surprise if case["condition_compare"] else None
    left = authors_kept(ids, schedule, size, surprise, start=start, alone=alone, keep=keep)
    assert [ids[start + i] for i in left] == FILE[f"{case['name']}_out"].tolist()


def test_the_authors_threshold() -> None:
    for rate, threshold in FILE["thr"].tolist():
        assert authors_threshold(torch.from_numpy(FILE["thr_in"]), rate) == threshold


@pytest.mark.parametrize("case", json.loads(str(BUDGET["cases"])))
def test_the_authors_choice_of_documents(case: dict[str, Any]) -> None:
    used = within_budget(BUDGET["lengths"].tolist(), case["rank"], case["target"], float(case["context_budget"]))
    order = {"sort": "relevance"}.get(case["reorder"], case["reorder"])
    changes = rate_changes(used, case["delta"])
    assert arranged(used, order) == case["used"]
    assert [changes[i] for i in case["used"]] == pytest.approx(case["dynamic_ratio"])


# ---- the paper's version --------------------------------------------------------------------------------------------


def test_what_is_dropped_is_the_unsurprising_token_itself() -> None:
    score = {1: 5.0, 2: 0.1, 3: 4.0, 4: 0.2}
    margin = margins(
        [1, 2, 3, 4], [0.5] * 4, [0, 1, 2, 3], 200, lambda ids, last: torch.tensor([score[i] for i in ids])
    )
    assert (margin > 0).tolist() == [True, False, True, False]


@pytest.mark.parametrize("size", [7, 20, 200])
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_every_segment_keeps_its_share(size: int, rate: float) -> None:
    ids = FILE["basic_in"].tolist()
    kept = margins(ids, [rate] * len(ids), range(len(ids)), size, surprise_of_all) > 0
    starts = [start for start in range(0, len(ids), size) if start == 0 or len(ids) - start >= size // 2]
    for start, end in pairwise([*starts, len(ids)]):
        assert abs(int(kept[start:end].sum()) - rate * (end - start)) <= 1


def test_a_short_rest_is_no_segment_of_its_own() -> None:
    read: list[int] = []

    def noted(ids: list[int], last: int) -> Tensor:
        read.append(last)
        return torch.arange(float(last))

    for n in (49, 50, 60, 69, 70):
        margins(range(n), [0.5] * n, range(n), 20, noted)
    assert read == [20, 29, 20, 20, 10, 20, 20, 20, 20, 20, 29, 20, 20, 20, 10]


def surprise_of_all(ids: list[int], last: int) -> Tensor:
    """Like the stub, with a first token that is not predicted."""
    return torch.cat([torch.tensor([3.0]), surprise([*ids, 0], len(ids))[:-1]])[len(ids) - last :]


def test_segments_are_read_behind_what_was_kept() -> None:
    seen: list[tuple[list[int], int]] = []

    def odd(ids: list[int], last: int) -> Tensor:
        seen.append((list(ids), last))
        return torch.tensor([float(i % 2) for i in ids[-last:]])

    margins(list(range(8)), [0.5] * 8, list(range(8)), 4, odd)
    assert seen == [([0, 1, 2, 3], 4), ([1, 3, 4, 5, 6, 7], 4)]


def test_units_are_kept_or_dropped_as_a_whole() -> None:
    units = [0, 0, 1, 2, 2, 2, 3]
    margin = margins(list(range(7)), [0.5] * 7, units, 4, lambda ids, last: torch.tensor(ids[-last:]).float())
    assert len(margin) == 7
    assert margin[0] == margin[1] and margin[3] == margin[4] == margin[5]  # the unit 2 is not cut by the segment's end
    assert margin[3] > margin[2]


def test_a_share_of_one_keeps_and_counts_for_nothing() -> None:
    above = above_quantile(torch.tensor([9.0, 1.0, 2.0, 3.0]), torch.tensor([1.0, 0.5, 0.5, 0.5]))
    assert above.tolist() == [torch.inf, -1.0, 0.0, 1.0]
