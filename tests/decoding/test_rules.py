"""The rules, exactly: their acceptance and the law of what they return, enumerated instead of drawn."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenthrift.core.draft import Drawn
from tokenthrift.core.errors import ThriftError
from tokenthrift.decoding import rules

GOLDEN = Path(__file__).parents[1] / "golden" / "decoding"


@pytest.fixture
def run(monkeypatch):
    """``run(rule, p, drawn, uniforms)``: the uniforms used up, and what was left to sample from, None if a guess stood.

    The rule gets these uniforms, then ones that reject whatever can be rejected.
    """

    transport = functools.cache(rules.transport)  # by identity of the tensors, for speed

    def run(rule, p, drawn, uniforms):
        used, rest = [], []

        def rand(size):
            used.append(uniforms[len(used)] if len(used) < len(uniforms) else 1.0)
            return torch.tensor(used[-1], dtype=torch.float64)

        def sample(p, guesses, drawn):
            rest.append(p)
            return -1

        with monkeypatch.context() as patch:
            patch.setattr(rules, "transport", transport)
            patch.setattr(rules.torch, "rand", rand)
            patch.setattr(rules, "sample", sample)
            token = rule(p, list(dict.fromkeys(drawn.tokens)), drawn)
        assert token == (-1 if rest else drawn.tokens[len(used) - 1])
        return len(used), (rest[0] if rest else None)

    return run


@pytest.fixture
def enumerate_(run):
    """``enumerate_(rule, p, q, tokens)``: the law of the token, and the chance of every try, for guesses drawn so."""

    def enumerate_(rule, p, q, tokens):
        law, reached, chances, drawn = torch.zeros_like(p), 1.0, [], Drawn(tokens, q)
        for i, token in enumerate(tokens):
            low, high = 0.0, 1.0
            if run(rule, p, drawn, [1.0] * (i + 1)) == (i + 1, None):
                low = 1.0
            while high - low > 1e-9:
                middle = (low + high) / 2
                accepted = run(rule, p, drawn, [1.0] * i + [middle]) == (i + 1, None)
                low, high = (middle, high) if accepted else (low, middle)
            chances.append(low)
            law[token] += reached * low
            reached *= 1 - low
            if low == 1.0:
                return law, chances
        _, rest = run(rule, p, drawn, [])
        return law + reached * rest, chances

    return enumerate_


def without_replacement(q, k):
    """Every order of k guesses, with its probability."""
    for tokens in itertools.permutations(range(len(q)), k):
        chance, left = 1.0, 1.0
        for token in tokens:
            chance, left = chance * float(q[token]) / left, left - float(q[token])
        yield tokens, chance


def with_replacement(q, k):
    for tokens in itertools.product(range(len(q)), repeat=k):
        yield tokens, float(torch.stack([q[t] for t in tokens]).prod())


def test_recursive_rejection_equals_the_golden(enumerate_):
    golden = np.load(GOLDEN / "rsd_recursive_rejection.npz")
    p, q = torch.tensor(golden["p"]), torch.tensor(golden["q"])
    _, chances = enumerate_(rules.reject, p, q, golden["order"].tolist())
    np.testing.assert_allclose(chances, golden["accept_prob"][: len(chances)], atol=1e-7)
    residual, draft = p, q
    for step, token in enumerate(golden["order"].tolist()):
        np.testing.assert_allclose(residual, golden["p_residuals"][step], atol=1e-12)
        np.testing.assert_allclose(draft, golden["q_conditionals"][step], atol=1e-12)
        residual = rules.residual(residual, draft)
        draft = draft.clone()
        draft[token] = 0
        draft /= draft.sum()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_recursive_rejection_returns_the_models_law(enumerate_, k):
    golden = np.load(GOLDEN / "rsd_recursive_rejection.npz")
    p, q = torch.tensor(golden["p"]), torch.tensor(golden["q"])
    law, accepted = torch.zeros_like(p), 0.0
    for tokens, chance in without_replacement(q, k):
        given, tries = enumerate_(rules.reject, p, q, list(tokens))
        law += chance * given
        accepted += chance * (1 - float(np.prod([1 - t for t in tries])))
    torch.testing.assert_close(law, p, rtol=0, atol=1e-6)
    assert accepted == pytest.approx(golden["total_accept_wor"][k - 1], abs=1e-6)


@pytest.mark.parametrize("size", [5, 8])
def test_transport_equals_the_golden(run, size):
    golden = np.load(GOLDEN / "spectr_kseq.npz")
    p, q = torch.tensor(golden[f"target_{size}"]), torch.tensor(golden[f"draft_{size}"])
    for row, residual in zip(golden[f"k_rho_beta_pacc_{size}"], golden[f"residual_{size}"], strict=True):
        k = int(row[0])
        assert rules.transport(p, q, k) == pytest.approx(row[1:], abs=1e-9)
        surely_rejected = int((p / q).argmin())
        used, rest = run(rules.k_seq, p, Drawn([surely_rejected] * k, q), [])
        assert used == k
        np.testing.assert_allclose(rest, residual, atol=1e-9)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_k_sequential_selection_returns_the_models_law(enumerate_, k):
    golden = np.load(GOLDEN / "spectr_kseq.npz")
    p, q = torch.tensor(golden["target_5"]), torch.tensor(golden["draft_5"])
    law = sum(c * enumerate_(rules.k_seq, p, q, list(tokens))[0] for tokens, c in with_replacement(q, k))
    torch.testing.assert_close(law, p, rtol=0, atol=1e-6)


def test_the_enumeration_sees_guesses_that_were_drawn_otherwise(enumerate_):
    """Repeats judged as if there were none; and the other way round."""
    golden = np.load(GOLDEN / "spectr_kseq.npz")
    p, q = torch.tensor(golden["target_5"]), torch.tensor(golden["draft_5"])
    for rule, draws in ((rules.reject, with_replacement), (rules.k_seq, without_replacement)):
        law = sum(c * enumerate_(rule, p, q, list(tokens))[0] for tokens, c in draws(q, 2))
        assert float((law - p).abs().max()) > 1e-2


def test_every_token_is_accepted_where_draft_and_target_agree(run):
    p = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    for token in range(3):
        for rule in (rules.reject, rules.k_seq):
            assert run(rule, p, Drawn([token], p * (1 - 1e-12)), []) == (1, None)


def test_guesses_that_were_not_drawn_are_sampled(monkeypatch):
    p = torch.tensor([0.0, 0.0, 1.0])
    assert {rule(p, [0, 1], None) for rule in (rules.sample, rules.reject, rules.k_seq)} == {2}


def test_a_draft_that_has_no_further_guess_leaves_the_residual(enumerate_):
    """The draft's whole support was guessed: nothing is left of its law."""
    p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    q = torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64)
    law = sum(c * enumerate_(rules.reject, p, q, list(t))[0] for t, c in (((0, 1), 0.6), ((1, 0), 0.4)))
    torch.testing.assert_close(law, p, rtol=0, atol=1e-6)


def test_typical_acceptance_is_lossy_and_says_so():
    assert rules.LOSSY == ("typical",)
    assert "lossy" in (rules.typical.__doc__ or "").split("\n")[0]
    rule = rules.typical(epsilon=0.09, delta=0.3)
    sure = torch.tensor([0.04, 0.9, 0.06])
    assert rule(sure, [0, 2], None) == 1  # too unlikely: the likeliest token instead
    flat = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2])
    assert rule(flat, [3, 4], None) == 3  # entropy log 5: enough is min(0.09, 0.3 / 5)
    assert rule(torch.tensor([0.5, 0.3, 0.2]), [2, 1], None) == 1  # the likeliest guess, not the likeliest token
    assert rule(sure, [], None) == 1


def test_an_unknown_rule_is_named():
    with pytest.raises(ThriftError, match=r"no verification rule 'rejekt'.*reject"):
        rules.rule_of("rejekt")
