"""Drafters that copy from the text: suffix automaton and CopySpec."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from tokenthrift.core.errors import ThriftError
from tokenthrift.decoding.chances import Calibration, Trust
from tokenthrift.decoding.copyspec import CopySpec
from tokenthrift.decoding.suffix_automaton import SuffixAutomaton, SuffixAutomatonDrafts

GOLDEN = Path(__file__).parents[1] / "golden" / "decoding"


def noisy_text(seed: int, length: int, vocabulary: int = 5) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocabulary) for _ in range(length)]


# ---- trust ----------------------------------------------------------------------------------------------------------


def test_trust_multiplies_along_the_copy_and_follows_what_happened():
    trust = Trust(3)
    assert trust.chances(1, 4) == pytest.approx([0.1, 0.1 * 0.3, 0.1 * 0.3 * 0.5])
    assert trust.chances(7, 2) == trust.chances(3, 2)
    trust.note(3, True)
    assert trust.chances(3, 1) == pytest.approx([0.5 + 0.5 / 5])  # the start counts as four guesses
    for _ in range(50):
        trust.note(2, False)
    assert trust.chances(1, 4) == pytest.approx([0.1])
    assert len(trust.chances(1, 4, least=0.0)) == 4
    for _ in range(200):
        trust.note(3, True)
    assert trust.chances(3, 2) == pytest.approx([0.995, 0.995**2])  # never quite sure


def test_calibration_learns_the_share_of_right_guesses_at_each_score():
    rng, calibration = random.Random(0), Calibration()
    for _ in range(3000):
        calibration.note(0.9, rng.random() < 0.5)
        calibration.note(0.1, rng.random() < 0.02)
    assert calibration(0.9) == pytest.approx(0.5, abs=0.2)
    assert calibration(0.1) < 0.1
    assert calibration(1.0) <= 0.995


# ---- suffix automaton -----------------------------------------------------------------------------------------------


def test_states_matches_and_drafts_equal_the_authors_automaton():
    """17 looks at a growing text by SAM-Decoding's DynSAM with n_predicts=8."""
    golden = np.load(GOLDEN / "sam_decoding_dynsam.npz")
    text = golden["seq"].tolist()
    method = SuffixAutomatonDrafts(draft=7, overlap=False, adaptive=False)
    drafter, fed = method.start(text[:4]), 4
    for row, draft in zip(golden["rows"].tolist(), golden["drafts"].tolist(), strict=True):
        added, start, state, length, at, matched, states, first = row
        drafter.extend(text[fed:added])
        fed = added
        assert drafter.match == (at, matched)  # of the last token that was added
        look = method.start([*text[:added], start])
        assert look.match == (state, length)
        assert len(look.automaton.next) == states
        source = look._source()
        assert (source[1] if source else 0) == first
        if source is None:
            continue  # theirs drafts the beginning of the text
        known = min(7, added - first)  # theirs has zeros after that, ours has the last token too
        ours = look.propose(100).tokens
        assert ours[:known] == draft[1 : 1 + known]
        assert ours[known:] == [start][: 7 - known]
    automaton = SuffixAutomaton()
    for token in text:
        automaton.append(token)
    for ours, name in zip(
        (automaton.link, automaton.length, automaton.first), ("link", "length", "min_endpos"), strict=True
    ):
        assert ours == golden[name].tolist()


@pytest.mark.parametrize("seed", range(6))
def test_the_match_is_the_longest_suffix_that_occurred_before(seed):
    text = noisy_text(seed, 90, 3)
    drafter = SuffixAutomatonDrafts(draft=5, overlap=False, adaptive=False).start([])
    for end, token in enumerate(text, 1):
        drafter.extend([token])
        earlier = [n for n in range(1, end) for s in range(end - n) if text[s : s + n] == text[end - n : end]]
        assert drafter.match[1] == max(earlier, default=0)
        source = drafter._source()
        if source:
            n, at = source
            starts = [s for s in range(end) if text[s : s + n] == text[end - n : end]]
            assert at == starts[0] + n  # the first occurrence


def test_a_match_too_near_the_end_gives_way_to_a_shorter_one():
    text = [5, 2, 8, 9, 1, 2, 6, 7, 3, 1, 2]  # after the first "1 2" come four tokens before the last one
    method = SuffixAutomatonDrafts
    assert method(draft=3, overlap=False, adaptive=False).start(text).propose(9).tokens == [6, 7, 3]
    assert method(draft=4, overlap=False, adaptive=False).start(text).propose(9).tokens == [8, 9, 1, 2]
    assert method(draft=4, adaptive=False).start(text).propose(9).tokens == [6, 7, 3, 1]


def test_a_loop_is_drafted_in_full_and_short_matches_can_be_left_out():
    text = [9, 1, 2, 3, 1, 2, 3]
    assert SuffixAutomatonDrafts(draft=8, adaptive=False).start(text).propose(9).tokens == [1, 2, 3, 1, 2, 3, 1, 2]
    assert SuffixAutomatonDrafts(draft=8, adaptive=False, overlap=False).start(text).propose(9).tokens == [1, 2, 3]
    assert not len(SuffixAutomatonDrafts(shortest=4).start(text).propose(9))
    assert len(SuffixAutomatonDrafts(shortest=3).start(text).propose(9)) > 0


# ---- CopySpec -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [3, 5, 2])
def test_every_call_of_the_target_equals_the_authors(gamma):
    """What CopySpec's generate_raw fed to its target model after the prompt: the last token and the copies."""
    golden = np.load(GOLDEN / "copyspec.npz")
    copy = dict(zip(golden["gammas"].tolist(), golden["number_copy"].tolist(), strict=True))[gamma]
    prompt, text = golden["prompt"][0].tolist(), golden[f"out_g{gamma}"][0].tolist()
    drafter = CopySpec(gamma=gamma, copy=copy, adaptive=False).start(prompt)
    at, accepted = len(prompt), 0
    drafter.extend(text[at : at + 1])
    calls = [[t for t in call if t >= 0] for call in golden[f"calls_g{gamma}"].tolist()]
    for call in calls:
        draft = list(drafter.propose(len(text) - at - 1).tokens)
        assert [text[at], *draft] == call
        right = next((i for i, t in enumerate(draft) if text[at + 1 + i] != t), len(draft))
        accepted += right
        drafter.extend(text[at + 1 : at + 2 + right])
        at += 1 + right
    assert accepted == golden[f"accepted_g{gamma}"]


def test_the_first_occurrence_of_each_3_gram_is_found():
    golden = np.load(GOLDEN / "copyspec.npz")
    prompt = golden["prompt"][0].tolist()
    for start, first, _ in golden["prompt_lookup_gamma3"].tolist():
        drafter = CopySpec(adaptive=False).start([*prompt, 39, *prompt[start : start + 3]])
        assert drafter._at == first + 3


@pytest.mark.parametrize("gamma", [1, 2, 4])
def test_the_rolling_hash_finds_what_a_rescan_finds(gamma):
    text = noisy_text(gamma, 120, 3)
    drafter = CopySpec(gamma=gamma, copy=6, adaptive=False).start(text[:2])
    for end in range(2, 120):
        starts = (
            [s for s in range(end - gamma) if text[s : s + gamma] == text[end - gamma : end]] if end > gamma else []
        )
        expected = text[starts[0] + gamma : min(starts[0] + gamma + 6, end)] if starts else []
        assert list(drafter.propose(100).tokens) == expected
        drafter.extend(text[end : end + 1])


# ---- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SuffixAutomatonDrafts, CopySpec])
def test_limits_hold(method):
    for adaptive in (True, False):
        drafter = method(adaptive=adaptive).start([1] * 30)
        assert len(drafter.propose(3)) == 3
        assert not len(drafter.propose(0))
        assert not len(method(adaptive=adaptive).start([]).propose(5))
        assert not len(method(adaptive=adaptive).start([1, 2, 3, 4, 5]).propose(5))


@pytest.mark.parametrize("method", [SuffixAutomatonDrafts, CopySpec])
def test_chances_shrink_on_noise_and_come_back_on_copies(method):
    rng = random.Random(0)
    drafter = method().start([rng.randrange(6) for _ in range(600)])
    drafter.extend([rng.randrange(6) for _ in range(600)])
    expected = 0.0
    for _ in range(100):
        expected += sum(drafter.propose(10).chances or ())
        drafter.extend([rng.randrange(6)])
    assert expected < 60  # of up to 1,000 guesses
    loop = rng.sample(range(6, 60), 30)
    drafter.extend(loop * 4)
    draft = drafter.propose(10)
    assert list(draft.tokens) == loop[:10]
    assert min(draft.chances) > 0.5


@pytest.mark.parametrize(
    ("method", "params", "says"),
    [
        (SuffixAutomatonDrafts, {"draft": 0}, "draft"),
        (SuffixAutomatonDrafts, {"shortest": 2.5}, "shortest"),
        (CopySpec, {"gamma": 0}, "gamma"),
        (CopySpec, {"copy": True}, "copy"),
    ],
)
def test_wrong_parameters_say_what_is_wrong(method, params, says):
    with pytest.raises(ThriftError, match=says):
        method(**params)
