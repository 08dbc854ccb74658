"""Teacher forcing through a model's own ``generate``, so that whatever acts on prompts, caches or decoding acts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


@torch.no_grad()
def follow(model: Any, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[Tensor]:
    """What a causal model says while it is made to write a given continuation of each prompt.

    The prompts are one left-padded batch; each token of a continuation is a decoding step of its own.

    Args:
        model: a ``transformers`` model, with or without a session around.
        prompts, continuations: token ids, at least one in each.

    Returns:
        For each row the logits ``(tokens of the continuation, vocabulary)`` that predict them, in float32.
    """
    length, steps = max(map(len, prompts)), max(map(len, continuations))
    ids = torch.zeros(len(prompts), length, dtype=torch.long, device=model.device)
    mask = torch.zeros_like(ids)
    # Rows that are at their end go on with a token of no meaning, which nobody looks at.
    wanted = torch.zeros(len(prompts), steps, dtype=torch.long, device=model.device)
    for row, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
        wanted[row, : len(continuation)] = torch.tensor(continuation)
    never = int(model.config.get_text_config(decoder=True).vocab_size)  # an end would pad what comes after it
    config = GenerationConfig(
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=never,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([_Follow(wanted, length)]),
    )
    logits = torch.stack(out.logits, dim=1)
    return [logits[row, : len(continuation)] for row, continuation in enumerate(continuations)]


class _Follow(LogitsProcessor):
    """Leaves no choice but the wanted token."""

    def __init__(self, wanted: Tensor, length: int) -> None:
        self.wanted, self.length = wanted, length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.wanted[:, input_ids.shape[1] - self.length, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)
