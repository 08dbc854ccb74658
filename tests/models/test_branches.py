"""Branches of a prompt that is read once: the logits are those of every whole prompt."""

from __future__ import annotations

import pytest
import torch

import tokenthrift as tt
from tiny_models import FAMILIES, fingerprint, tiny
from tokenthrift.models import branches
from tokenthrift.models.branches import branch_logits

LENGTHS = (3, 30, 1, 17, 8, 25)


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


SHARED, BRANCHES = ids(40, 0), [ids(n, n) for n in LENGTHS]


def whole(model, pick, shared=SHARED):
    with torch.no_grad():
        return torch.stack([model(torch.tensor([shared + b])).logits[0, -1, pick] for b in BRANCHES])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_whole_prompts(family, attention, monkeypatch):
    """Also where the groups are smaller than a branch, and with sliding windows that have forgotten the start."""
    monkeypatch.setattr(branches, "TOKENS", 28)
    model = tiny(family, attention)
    before = fingerprint(model)
    told = []
    got = branch_logits(model, SHARED, BRANCHES, [5, 9], lambda *done: told.append(done))
    torch.testing.assert_close(got, whole(model, [5, 9]), atol=2e-6, rtol=1e-5)
    assert told[-1] == (6, 6) and len(told) == 4
    assert fingerprint(model) == before


def test_the_prompt_goes_through_the_model_once():
    model, seen = tiny("llama"), []
    handle = model.model.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["input_ids"].shape[1]), with_kwargs=True
    )
    branch_logits(model, SHARED, BRANCHES, [5])
    handle.remove()
    assert seen == [len(SHARED) - 1, 1 + sum(LENGTHS)]


def test_a_prompt_of_one_token_and_a_model_that_takes_no_trees(monkeypatch):
    model = tiny("llama")
    torch.testing.assert_close(branch_logits(model, [7], BRANCHES, [5]), whole(model, [5], [7]), atol=1e-6, rtol=1e-5)
    monkeypatch.setattr(branches, "can_pack", lambda *a: False)
    torch.testing.assert_close(branch_logits(model, SHARED, BRANCHES, [5]), whole(model, [5]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "plan",
    [
        "cache=knorm(budget=8)",
        "decode=prompt_lookup()",
        "attention=quest(page=4, budget=8)",
        "prefill=gemfilter(budget=8)",
        "prefill=prepacking()",
    ],
)
def test_a_session_does_not_change_or_count_what_is_asked(plan):
    model = tiny("llama")
    want = whole(model, [5])
    with tt.apply(plan, model) as session:
        got = branch_logits(model, SHARED, BRANCHES, [5])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    assert session.report().forwards == 0
