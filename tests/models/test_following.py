"""Teacher forcing through generate: the logits of plain forwards, in padded batches, and of reduced caches."""

from __future__ import annotations

import pytest
import torch

import tokenthrift as tt
from tokenthrift.models.following import follow

from ..tiny_models import tiny

PROMPTS = [[1, 5, 9, 13, 17, 21, 25, 29], [1, 40, 41], [1, 7, 7, 60, 61]]
CONTINUATIONS = [[33, 34], [2, 50, 2, 51], [3]]  # 2 ends a sequence


@torch.no_grad()
def alone(model, prompt, continuation):
    """One row, one forward for the prompt and one for each token."""
    out = model(torch.tensor([prompt]), use_cache=True)
    logits = [out.logits[0, -1]]
    for token in continuation[:-1]:
        out = model(torch.tensor([[token]]), past_key_values=out.past_key_values)
        logits.append(out.logits[0, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_a_batch_are_what_they_are_alone(attention: str) -> None:
    model = tiny("llama", attention)
    for got, *row in zip(follow(model, PROMPTS, CONTINUATIONS), PROMPTS, CONTINUATIONS, strict=True):
        torch.testing.assert_close(got, alone(model, *row), atol=1e-4, rtol=1e-4)


def test_a_reduced_cache_is_read() -> None:
    model = tiny("llama")
    plain = follow(model, PROMPTS, CONTINUATIONS)
    with tt.apply("cache=knorm(budget=4)", model):
        reduced = follow(model, PROMPTS, CONTINUATIONS)
        for got, *row in zip(reduced, PROMPTS, CONTINUATIONS, strict=True):
            torch.testing.assert_close(got, alone(model, *row), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reduced[0][0], plain[0][0])  # the prompt itself was read in full
    assert (reduced[0][1] - plain[0][1]).abs().max() > 1e-2


def test_settings_of_the_model_change_nothing() -> None:
    model = tiny("llama")
    plain = follow(model, PROMPTS, CONTINUATIONS)
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.suppress_tokens = [33, 50]
    model.generation_config.do_sample = True
    for got, wanted in zip(follow(model, PROMPTS, CONTINUATIONS), plain, strict=True):
        assert torch.equal(got, wanted)
