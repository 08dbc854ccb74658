"""What a model says after each of several continuations of one prompt, which it reads only once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..core.draft import ROOT, Draft
from .attention import Watcher, watching_instead
from .decoder import find_attentions
from .packed import PackedCache, Step, can_pack, packed_attention
from .replacing import plain_forward

TOKENS = 256
"""Tokens of continuations that go through the model at once: their logits are what takes memory."""


@torch.inference_mode()
def branch_logits(
    model: Any,
    shared: Sequence[int],
    branches: Sequence[Sequence[int]],
    pick: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Logits of some tokens after ``shared`` and each branch: ``(branches, pick)`` float32 on the CPU.

    The keys and values of ``shared`` are computed once. The branches follow as a tree, several in one forward, in which
    a token sees ``shared`` and its own branch; a model whose attention or cache takes no trees reads each prompt whole.
    Hooks on the model itself do not run, and nothing of a session's stages, so that a session does not count this.

    Args:
        model: a causal language model.
        shared: token ids, at least one.
        branches: token ids of each, at least one.
        pick: the tokens whose logits are returned.
        progress: called with (branches done, branches in all).
    """
    modules = find_attentions(model)
    found = torch.empty(len(branches), len(pick))
    done = 0
    with watching_instead(modules, lambda module: Watcher()):
        cache = _read(model, shared[:-1]) if len(shared) > 1 else None
        if cache is not None and can_pack(modules, cache):
            packed = PackedCache(cache, None)
            for group in _groups(branches):
                logits = _read_tree(model, modules, packed, shared[-1], group)
                found[done : done + len(group)] = logits[:, list(pick)].float().cpu()
                done += len(group)
                if progress is not None:
                    progress(done, len(branches))
            return found
    for done, branch in enumerate(branches):
        ids = torch.tensor([[*shared, *branch]], device=model.device)
        found[done] = plain_forward(model)(input_ids=ids, use_cache=False).logits[0, -1, list(pick)].float().cpu()
        if progress is not None:
            progress(done + 1, len(branches))
    return found


def _groups(branches: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Branches in order, at most :data:`TOKENS` together, or one that is longer."""
    group: list[Sequence[int]] = []
    for branch in branches:
        if group and sum(map(len, group)) + len(branch) > TOKENS:
            yield group
            group = []
        group.append(branch)
    if group:
        yield group


def _read(model: Any, ids: Sequence[int]) -> Any:
    """The cache of a prompt."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    kept = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    tokens = torch.tensor([list(ids)], device=model.device)
    return plain_forward(model)(input_ids=tokens, past_key_values=cache, use_cache=True, **kept).past_key_values


def _read_tree(
    model: Any, modules: Sequence[Any], cache: PackedCache, last: int, branches: Sequence[Sequence[int]]
) -> Tensor:
    """The logits at the branches' ends: ``(branches, vocabulary)``."""
    tokens: list[int] = []
    parents: list[int] = []
    for branch in branches:
        parents += [ROOT, *range(len(tokens), len(tokens) + len(branch) - 1)]
        tokens += branch
    # The prompt's last token is fed before them.
    ends = torch.tensor([len(branch) for branch in branches], device=model.device).cumsum(0)
    cache.packing.step = Step([Draft(tokens, parents)], model.device)
    keep = "logits_to_keep" in signature(model.forward).parameters
    with packed_attention(modules, cache):
        out = plain_forward(model)(
            input_ids=torch.tensor([[last, *tokens]], device=model.device),
            position_ids=torch.tensor([cache.packing.positions()], device=model.device),
            past_key_values=cache,
            use_cache=True,
            **({"logits_to_keep": ends} if keep else {}),
        )
    logits: Tensor = out.logits[0]
    return logits if keep else logits[ends]
