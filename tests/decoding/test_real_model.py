"""Every exact method on the real SmolLM2 and real prompts of all kinds: the tokens of plain generate, batch 1 and 8.

A few prompts; ``benchmarks/decode_methods.py`` runs all of them. About a minute a method on one core.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenthrift as tt
from tokenthrift.bench.decoding import exact_plans, load_prompts

pytestmark = [pytest.mark.slow, pytest.mark.packs]
NEW = 40
TIE = 1e-3  # two logits so near may change places when a forward has more tokens, in float32


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any]:
    model, tokenizer = tt.load("smollm2-135m")
    tokenizer.padding_side = "left"
    return model.float(), tokenizer


@pytest.fixture(scope="module")
def batches(real: tuple[Any, Any]) -> list[tuple[Any, list[list[int]]]]:
    """Inputs, and what plain generate makes of them: two prompts of every kind one by one, then eight together."""
    model, tokenizer = real
    prompts = [p.prompt for p in load_prompts(2)]
    found = []
    for group in (*([p] for p in prompts), prompts[:8]):
        chats = [[{"role": "user", "content": text}] for text in group]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        found.append((inputs, model.generate(**inputs, max_new_tokens=NEW, do_sample=False).tolist()))
    return found


def test_the_batch_is_padded(batches: list[tuple[Any, list[list[int]]]]) -> None:
    assert [len(out) for _, out in batches] == [1] * 12 + [8]
    assert (batches[-1][0]["attention_mask"] == 0).any()


@pytest.mark.parametrize("plan", exact_plans())
def test_tokens_are_those_of_plain_generate(
    real: tuple[Any, Any], batches: list[tuple[Any, list[list[int]]]], plan: str
) -> None:
    model, _ = real
    with tt.apply(plan, model) as session:
        outputs = [model.generate(**inputs, max_new_tokens=NEW, do_sample=False).tolist() for inputs, _ in batches]
    ties = 0
    for (inputs, plain), ours in zip(batches, outputs, strict=True):
        for row, (expected, got) in enumerate(zip(plain, ours, strict=True)):
            if expected != got:
                assert_a_tie(model, inputs["attention_mask"][row], expected, got)
                ties += 1
    assert ties <= 1  # of 20 texts; on most machines there is none
    assert session.records["decode"].extra["accepted"] > 0


def assert_a_tie(model: Any, mask: torch.Tensor, expected: list[int], got: list[int]) -> None:
    """Where the texts part, the model finds both tokens equally likely."""
    at = next(i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b)
    padding = int((mask == 0).sum())
    with torch.no_grad():
        logits = model(torch.tensor([expected[padding:at]])).logits[0, -1]
    gap = float(logits[expected[at]] - logits[got[at]])
    assert abs(gap) < TIE, f"token {at}: {got[at]} instead of {expected[at]}, which is likelier by {gap:.4f}"
