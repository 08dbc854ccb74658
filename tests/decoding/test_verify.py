"""The verifier alone: the law of what it commits when sampling, with a control that shows that the test can fail."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers.generation.logits_process import LogitsProcessorList, TemperatureLogitsWarper
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from tokenthrift.core.draft import Draft
from tokenthrift.decoding.verify import Stopper, Text, Verifier

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

    def _choose(self, rows, text, drafts, nodes, logits):
        at = nodes[0] + 1
        tokens = super()._choose(rows, text, drafts, nodes, logits)
        return [DRAFT[at]] if at < len(DRAFT) and random.random() < 0.1 else tokens


def judge(verifier: Verifier, prompts, drafts, logits) -> tuple[list[list[int]], Text]:
    """What is committed after ``prompts`` for chains, row by row."""
    text = Text(torch.tensor(prompts), 8)
    verdicts = verifier(text, [Draft.chain(draft) for draft in drafts], logits)
    assert all(v.cached == list(range(len(v.tokens) - 1)) for v in verdicts)
    return [v.tokens for v in verdicts], text


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
        verifier = kind(processors, stopper, sample=True, pad=None, batch=1)
        counts[tuple(judge(verifier, [[1]], [DRAFT], logits)[0][0])] += 1
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
    tokens, text = judge(verifier, [[7]], [[2, 0, 3]], P[None])
    assert tokens == [[2, 0, 5]]
    assert prefixes == [[7], [7, 2], [7, 2, 0]]
    assert text.all(pad=9).tolist() == [[7, 2, 0, 5]]


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
    one_hot = torch.eye(10)[torch.tensor([[5, 2, 2, 2], [3, 4, 6, 6]])]
    # Row 0 ends at once, and gets padding as long as row 1 accepts.
    tokens, text = judge(verifier, [[1], [1]], [[5, 2, 2], [3, 4, 6]], one_hot)
    assert tokens == [[5, 9, 9, 9], [3, 4, 6, 6]]
    assert text.all(pad=9).tolist() == [[1, 5, 9, 9, 9], [1, 3, 4, 6, 6]]
    assert (verifier.done, verifier.idle, verifier.finished) == ([True, False], [True, False], False)


def test_rows_of_their_own_pace():
    criteria = StoppingCriteriaList([EosTokenCriteria([5])])
    verifier = Verifier(LogitsProcessorList(), Stopper(criteria, 99), sample=False, pad=9, batch=2, joint=False)
    one_hot = torch.eye(10)[torch.tensor([[5, 2, 2, 2], [3, 4, 6, 6]])]
    tokens, text = judge(verifier, [[1], [1]], [[5, 2, 2], [3, 4, 6]], one_hot)
    assert tokens == [[5], [3, 4, 6, 6]]
    assert text.all(pad=9).tolist() == [[1, 5, 9, 9, 9], [1, 3, 4, 6, 6]]


def test_trees_are_walked_by_the_models_own_choices():
    draft = Draft(tokens=[2, 3, 0, 1, 5], parents=[-1, -1, 1, 1, 2])
    own = {-1: 3, 1: 0, 2: 5, 4: 7}
    logits = torch.eye(10)[torch.tensor([own.get(node, 9) for node in range(-1, 5)])]
    verifier = Verifier(LogitsProcessorList(), Stopper(StoppingCriteriaList(), 99), sample=False, pad=None, batch=1)
    [verdict] = verifier(Text(torch.tensor([[1]]), 8), [draft], [logits])
    assert (verdict.tokens, verdict.path) == ([3, 0, 5, 7], [1, 2, 4])


def test_greedy_stops_at_the_first_disagreement_whatever_follows():
    rng = random.Random(0)
    for _ in range(50):
        own = [rng.randrange(4) for _ in range(6)]
        draft = [rng.randrange(4) for _ in range(5)]
        verifier = Verifier(LogitsProcessorList(), Stopper(StoppingCriteriaList(), 99), sample=False, pad=None, batch=1)
        [new], _ = judge(verifier, [[0]], [draft], torch.eye(4)[torch.tensor([own])])
        agreed = next((i for i, (a, b) in enumerate(zip(own, draft, strict=False)) if a != b), 5)
        assert new == own[: agreed + 1]


def test_no_draft_is_a_plain_step():
    verifier = Verifier(LogitsProcessorList(), Stopper(StoppingCriteriaList(), 99), sample=False, pad=None, batch=1)
    assert judge(verifier, [[0]], [[]], P[None, :1])[0] == [[2]]
