"""Drafters without a model, in generation: exact for every model, alone and in left-padded batches."""

from __future__ import annotations

import pytest
import torch

import tokenthrift as tt

FULL = [
    "suffix_automaton(adaptive=False, draft=9)",
    "suffix_automaton(adaptive=False, draft=9, overlap=False)",
    "copyspec(adaptive=False, gamma=2)",
    "aded(adaptive=False, rounds=40)",
    "goose(adaptive=False, nodes=20, share=False)",
]
ADAPTIVE = ["suffix_automaton()", "copyspec()", "aded()", "goose()"]


def padded(prompts):
    rows = [prompts(seed, length) for seed, length in enumerate((24, 17, 9))]
    mask = (torch.arange(24) >= 24 - torch.tensor([[24], [17], [9]])).long()
    return torch.tensor([[0] * (24 - len(r)) + r for r in rows]), mask


@pytest.mark.parametrize("plan", FULL)
def test_greedy_tokens_are_those_of_plain_generate(model, prompts, plan):
    ids, mask = padded(prompts)
    options = {"do_sample": False, "max_new_tokens": 50, "pad_token_id": 0}
    for inputs in ({"input_ids": ids[:1]}, {"input_ids": ids, "attention_mask": mask}):
        plain = model.generate(**inputs, **options)
        with tt.apply(f"decode={plan}", model) as session:
            assert model.generate(**inputs, **options).tolist() == plain.tolist()
        record = session.records["decode"]
        assert record.extra["accepted"] > 0
        assert record.tokens_after < record.tokens_before


@pytest.mark.parametrize("plan", [*ADAPTIVE, *FULL[2:]])
def test_ends_processors_and_adaptive_drafts_change_no_token(llama, prompts, plan):
    ids, mask = padded(prompts)
    for options in ({"eos_token_id": [1, 5, 9], "repetition_penalty": 1.1}, {"max_new_tokens": 3}, {}):
        options = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": 0, **options}
        plain = llama.generate(ids, attention_mask=mask, **options)
        with tt.apply(f"decode={plan}", llama):
            assert llama.generate(ids, attention_mask=mask, **options).tolist() == plain.tolist()


@pytest.mark.parametrize("plan", [*ADAPTIVE, *FULL])
def test_sampled_tokens_are_those_of_plain_generate_with_the_same_seed(llama, prompts, plan):
    """The law of the output is then the model's, whatever the drafts are."""
    accepted = 0
    for seed in range(4):
        ids = torch.tensor([prompts(seed)])
        options = {"do_sample": True, "top_k": 0, "temperature": 0.5, "max_new_tokens": 30}
        torch.manual_seed(seed)
        plain = llama.generate(ids, **options)
        torch.manual_seed(seed)
        with tt.apply(f"decode={plan}", llama) as session:
            assert llama.generate(ids, **options).tolist() == plain.tolist()
        accepted += session.records["decode"].extra["accepted"]
    assert accepted > 0 or plan in ADAPTIVE  # what pays on a model this small depends on the machine


@pytest.mark.parametrize("plan", FULL)
def test_trees_become_chains_where_the_cache_takes_no_trees(lfm2, prompts, plan):
    ids = torch.tensor([prompts(0)])
    options = {"do_sample": False, "max_new_tokens": 30}
    plain = lfm2.generate(ids, **options)
    with tt.apply(f"decode={plan}", lfm2):
        assert lfm2.generate(ids, **options).tolist() == plain.tolist()


def test_an_empty_text_and_one_token_are_fine(llama):
    for plan in (*ADAPTIVE, *FULL):
        plain = llama.generate(torch.tensor([[3]]), do_sample=False, max_new_tokens=12)
        with tt.apply(f"decode={plan}", llama):
            assert llama.generate(torch.tensor([[3]]), do_sample=False, max_new_tokens=12).tolist() == plain.tolist()
