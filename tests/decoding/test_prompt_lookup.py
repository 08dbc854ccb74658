from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from tokenthrift.core.errors import ThriftError
from tokenthrift.core.plan import Plan
from tokenthrift.decoding.prompt_lookup import PromptLookup

GOLDEN = Path(__file__).parents[1] / "golden" / "decoding" / "pld_transformers.npz"


def rescan(tokens, ngram, draft, match):
    """The definition, without an index."""
    for n in range(min(ngram, len(tokens) - 1), 0, -1):
        starts = range(len(tokens) - n)
        for at in starts if match == "earliest" else reversed(starts):
            if tokens[at : at + n] == tokens[-n:]:
                return tokens[at + n : at + n + draft]
    return []


def test_proposals_equal_transformers_on_the_golden():
    """120 proposals of transformers 5.23's PromptLookupCandidateGenerator, end of sequence 6, maximal length 64."""
    golden = np.load(GOLDEN)
    for row in golden["rows"]:
        which, draft, ngram, count, *candidates = (int(v) for v in row)
        tokens = [int(t) for t in golden["inputs"][which] if t >= 0]
        method = PromptLookup(ngram=ngram, draft=draft, match="earliest", overlap=False, adaptive=False)
        ours = method.propose(tokens, 64)
        ours = ours[: ours.index(6)] if 6 in ours else ours  # transformers cuts before an end of sequence
        assert ours == candidates[:count]


@pytest.mark.parametrize("match", ["latest", "earliest"])
def test_the_index_finds_what_a_rescan_finds_at_every_length(match):
    rng = random.Random(1)
    for _ in range(20):
        tokens = [rng.randrange(5) for _ in range(60)]
        ngram, draft = rng.randint(1, 5), rng.randint(1, 8)
        method = PromptLookup(ngram=ngram, draft=draft, match=match, overlap=False, adaptive=False)
        drafter = method.start(tokens[:3])
        for end in range(3, 60):
            assert drafter.propose(100) == rescan(tokens[:end], ngram, draft, match)
            drafter.extend(tokens[end : end + 1])


def test_a_loop_is_drafted_in_full_where_the_copy_reaches_the_end():
    text = [9, 1, 2, 3, 1, 2, 3]
    assert PromptLookup(draft=8, adaptive=False).propose(text, 100) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert PromptLookup(draft=8, adaptive=False, overlap=False).propose(text, 100) == [1, 2, 3]


def test_limits_hold():
    method = PromptLookup(draft=5, adaptive=False)
    assert len(method.propose([1, 1, 1], 3)) == 3
    assert len(method.propose([1, 1, 1], 30)) == 5
    assert method.propose([1, 1, 1], 0) == []
    assert method.propose([], 5) == []
    assert method.propose([1, 2, 3], 5) == []


def test_adaptive_drafts_shrink_to_nothing_on_noise_and_come_back_on_copies():
    rng = random.Random(0)
    drafter = PromptLookup(draft=10, ngram=3).start([rng.randrange(40) for _ in range(200)])
    drafter.extend([rng.randrange(40) for _ in range(400)])
    drafted = 0
    for _ in range(100):
        drafted += len(drafter.propose(10))
        drafter.extend([rng.randrange(40)])
    assert drafted < 100  # plain prompt lookup would draft about 1,000
    loop = [rng.randrange(40) for _ in range(30)]
    drafter.extend(loop + loop + loop)
    assert drafter.propose(10) == loop[:10]


def test_adaptive_drafts_are_a_prefix_of_full_ones():
    rng = random.Random(2)
    adaptive, full = (PromptLookup(adaptive=a).start([1, 2, 3, 1, 2]) for a in (True, False))
    for _ in range(300):
        draft = adaptive.propose(16)
        assert draft == full.propose(16)[: len(draft)]
        token = [rng.randrange(4)]
        adaptive.extend(token)
        full.extend(token)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"ngram": 0}, "ngram"),
        ({"draft": 2.5}, "draft"),
        ({"draft": True}, "draft"),
        ({"match": "first"}, "'earliest'"),
        ({"cost": 0}, "cost"),
    ],
)
def test_wrong_parameters_say_what_is_wrong(params, says):
    with pytest.raises(ThriftError, match=says):
        PromptLookup(**params)


def test_plans_know_the_method():
    plan = Plan.parse("prompt_lookup(ngram=3)")
    assert str(plan) == "decode=prompt_lookup(ngram=3)"
    assert plan.at("decode") == [PromptLookup(ngram=3)]
