"""The verifier alone: the law of what it commits when sampling, with a control that shows that the test can fail."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers.generation.logits_process import LogitsProcessorList, TemperatureLogitsWarper
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from tokenthrift.decoding.verify import Stopper, Verifier

DRAFT = [2, 0, 5]
P = torch.tensor(
    [
        [0.10, 0.05, 0.50, 0.05, 0.10, 0.20],
        [0.60, 0.10, 0.05, 0.05, 0.10, 0.10],
        [0.05, 0.25, 0.10, 0.10, 0.10, 0.40],
        [0.30, 0.10, 0.20, 0.10, 0.20, 0.10],
    ]
)
DRAWS = 6000


class Eager(Verifier):
    """Wrong on purpose: takes the drafted token 10 times in 100 without asking."""

    def _pick(self, ids, logits):
        at = ids.shape[1] - 1
        tokens = super()._pick(ids, logits)
        return [DRAFT[at]] if at < len(DRAFT) and random.random() < 0.1 else tokens


def law() -> dict[tuple[int, ...], float]:
    """Exact probabilities of what is committed: the draft up to some place, and the model's own token there."""
    out, reached = {}, 1.0
    for i, p in enumerate(P.tolist()):
        for token, q in enumerate(p):
            if i == len(DRAFT) or token != DRAFT[i]:
                out[(*DRAFT[:i], token)] = reached * q
        if i < len(DRAFT):
            reached *= p[DRAFT[i]]
    return out


def chi_square(kind: type[Verifier]) -> tuple[float, float]:
    """The statistic of DRAWS draws, and its upper 0.001 quantile (Wilson and Hilferty's approximation)."""
    torch.manual_seed(0)
    random.seed(0)
    # Temperature 2 on twice the log-probabilities: P again, by way of a processor.
    processors = LogitsProcessorList([TemperatureLogitsWarper(2.0)])
    logits = 2 * P.log()[None]
    expected = law()
    assert sum(expected.values()) == pytest.approx(1)
    counts = dict.fromkeys(expected, 0)
    stopper = Stopper(StoppingCriteriaList(), max_length=99)
    for _ in range(DRAWS):
        text = torch.tensor([[1, *DRAFT, 0]])
        verifier = kind(processors, stopper, sample=True, pad=None, batch=1)
        counts[tuple(t for (t,) in verifier(text, 1, [DRAFT], logits))] += 1
    statistic = sum((counts[k] - DRAWS * p) ** 2 / (DRAWS * p) for k, p in expected.items())
    freedom = len(expected) - 1
    return statistic, freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


def test_committed_tokens_follow_the_models_law():
    statistic, critical = chi_square(Verifier)
    assert statistic < critical


def test_the_test_sees_a_verifier_that_favours_the_draft():
    """Its noncentrality is about 120 on 20 degrees of freedom: power above 0.999 at this level."""
    statistic, critical = chi_square(Eager)
    assert statistic > critical


def test_processors_get_only_committed_prefixes():
    prefixes = []

    def note(ids, scores):
        prefixes.append(ids[0].tolist())
        return scores

    verifier = Verifier(
        LogitsProcessorList([note]), Stopper(StoppingCriteriaList(), 99), sample=False, pad=None, batch=1
    )
    text = torch.tensor([[7, 2, 0, 3, 9]])
    assert verifier(text, 1, [[2, 0, 3]], P[None]) == [[2], [0], [5]]
    assert prefixes == [[7], [7, 2], [7, 2, 0]]
    assert text[0, :4].tolist() == [7, 2, 0, 5]


def test_criteria_of_length_and_end_are_answered_as_transformers_answers_them():
    criteria = StoppingCriteriaList([MaxLengthCriteria(6), EosTokenCriteria([3, 4])])
    stopper = Stopper(criteria, max_length=50)
    assert not stopper.reads_tensors
    for ids in ([1, 2, 5], [1, 2, 3], [1, 3, 2], [1, 2, 2, 2, 2], [1, 2, 2, 2, 2, 2], [2, 2, 2, 2, 2, 2, 2]):
        expected = criteria(torch.tensor([ids]), None).tolist()
        assert stopper(ids[-1:], None, len(ids), None) == expected


def test_rows_move_together_and_finished_rows_are_padded():
    criteria = StoppingCriteriaList([EosTokenCriteria([5])])
    verifier = Verifier(LogitsProcessorList(), Stopper(criteria, 99), sample=False, pad=9, batch=2)
    text = torch.full((2, 8), 1)
    one_hot = torch.eye(10)[torch.tensor([[5, 2, 2, 2], [3, 4, 6, 6]])]
    # Row 0 ends at once; its draft for the next place is not padding, so both rows stop there.
    assert verifier(text, 1, [[5, 2, 2], [3, 4, 6]], one_hot) == [[5, 3], [9, 4]]
    assert (verifier.done, verifier.idle, verifier.finished) == ([True, False], [True, False], False)


def test_greedy_stops_at_the_first_disagreement_whatever_follows():
    rng = random.Random(0)
    for _ in range(50):
        own = [rng.randrange(4) for _ in range(6)]
        draft = [rng.randrange(4) for _ in range(5)]
        verifier = Verifier(LogitsProcessorList(), Stopper(StoppingCriteriaList(), 99), sample=False, pad=None, batch=1)
        new = verifier(torch.zeros(1, 9, dtype=torch.long), 1, [draft], torch.eye(4)[torch.tensor([own])])
        agreed = next((i for i, (a, b) in enumerate(zip(own, draft, strict=False)) if a != b), 5)
        assert [t for (t,) in new] == own[: agreed + 1]


def test_no_draft_is_a_plain_step():
    verifier = Verifier(LogitsProcessorList(), Stopper(StoppingCriteriaList(), 99), sample=False, pad=None, batch=1)
    assert verifier(torch.zeros(1, 4, dtype=torch.long), 1, [[]], P[None, :1]) == [[2]]
