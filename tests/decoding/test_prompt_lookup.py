from __future__ import annotations

import itertools
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
            assert list(drafter.propose(100).tokens) == rescan(tokens[:end], ngram, draft, match)
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


def test_chances_shrink_on_noise_and_come_back_on_copies():
    rng = random.Random(0)
    drafter = PromptLookup(draft=10, ngram=3).start([rng.randrange(40) for _ in range(200)])
    drafter.extend([rng.randrange(40) for _ in range(400)])
    expected = 0.0
    for _ in range(100):
        expected += sum(drafter.propose(10).chances or ())
        drafter.extend([rng.randrange(40)])
    assert expected < 10  # of about 1,000 that plain prompt lookup would draft, 25 would be right
    loop = [rng.randrange(40) for _ in range(30)]
    drafter.extend(loop + loop + loop)
    draft = drafter.propose(10)
    assert draft.tokens == loop[:10]
    assert min(draft.chances) > 0.5


def test_chances_are_those_that_guesses_had():
    """On a text with a known share of copies: of guesses said to be right with some chance, as many are."""
    rng = random.Random(3)
    text = [rng.randrange(50) for _ in range(300)]
    drafter = PromptLookup(draft=6, ngram=4).start(text)
    said, right = [0.0] * 6, [0] * 6
    at = 0
    for _ in range(6000):
        at = (at + 1) % 300 if rng.random() < 0.8 else rng.randrange(300)
        draft = drafter.propose(6)
        token = text[at]
        if len(draft):
            said[0] += draft.chances[0]
            right[0] += draft.tokens[0] == token
        drafter.extend([token])
    assert said[0] == pytest.approx(right[0], rel=0.1)
    assert right[0] > 3000


def test_adaptive_drafts_are_a_prefix_of_full_ones():
    rng = random.Random(2)
    adaptive, full = (PromptLookup(adaptive=a).start([1, 2, 3, 1, 2]) for a in (True, False))
    for _ in range(300):
        draft, whole = adaptive.propose(16), full.propose(16)
        assert list(draft.tokens) == list(whole.tokens[: len(draft)])
        assert all(a >= b for a, b in itertools.pairwise(draft.chances or ()))
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
    ],
)
def test_wrong_parameters_say_what_is_wrong(params, says):
    with pytest.raises(ThriftError, match=says):
        PromptLookup(**params)


def test_plans_know_the_method():
    plan = Plan.parse("prompt_lookup(ngram=3)")
    assert str(plan) == "decode=prompt_lookup(ngram=3)"
    assert plan.at("decode") == [PromptLookup(ngram=3)]
