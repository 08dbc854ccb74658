"""Learn how many tokens each layer of an encoder prunes and merges (DiffRate, arXiv 2305.17997), on unlabelled images.

The encoder is neither changed nor copied; its weights stay as they are. While a schedule is learned all tokens stay in
place and are masked: attention no longer sees those that are gone (``ops/rates.py`` says how the masks get a gradient),
and what merges is averaged into the token that stays. Only the distributions over kept numbers are trained.

From the authors' training branch: the masks, the masked softmax, the merge with its sizes (never below 1 here, unlike
when the numbers are applied), the FLOPs, AdamW at 0.01 without weight decay, a first layer that never compresses.
Assumed here, since there are no labels: the loss, the cosine distance to the features of the unreduced model; the
weight of the FLOPs, theirs for shares instead of GFLOPs of a DeiT-S; and a start at the FLOPs asked for, every layer
keeping the same share of its tokens, where theirs starts with all numbers equally likely and takes epochs to get there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ..core.costs import attention_flops, linear_flops
from ..core.errors import ThriftError
from ..ops.rates import (
    LayerCost,
    candidates,
    encoder_flops,
    kept_number,
    masked_softmax,
    prune_and_merge,
    rank_tokens,
    survival,
    survival_mask,
)
from .attention import replace_attention
from .encoder import EncoderAdapter, part

FLOPS_WEIGHT = 100.0
"""Of the squared distance to the target: the authors' 5 per GFLOP² is about 100 per share² of a DeiT-S."""


def learn_rates(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    flops: float,
    steps: int,
    lr: float = 0.01,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The numbers of tokens to keep in every layer, as ``diffrate(schedule=...)`` reads them.

    Args:
        model: a vision encoder of a known family, or a model that holds one. It is left as it was.
        batches: images, ``(batch, 3, height, width)`` each or the encoder's keyword arguments, all of one size. They
            are gone through in a new order each time, as often as the steps need.
        flops: what the encoder may cost, as a share of its FLOPs without reduction.
        steps: optimiser steps, one batch each.
        seed: of the order of the batches.
        progress: called with (steps done, steps in all).

    Returns:
        ``prune`` and ``merge``, the tokens kept in each layer after pruning and after merging, prefix included; the
        ``model`` and its number of ``tokens``; the share of ``flops`` that these numbers cost; and the ``loss`` over
        all batches of the even schedule that learning began with, and of the learned one.

    Raises:
        ThriftError: no encoder of images in the model, no batches, images of several sizes, or a share of FLOPs that
            no schedule reaches.
    """
    held = list(batches)
    if not held:
        raise ThriftError("learning rates needs images: give at least one batch")
    if steps < 1:
        raise ThriftError(f"steps={steps}: write a number of at least 1, such as steps=200")
    if not 0 < flops <= 1:
        raise ThriftError(
            f"flops={flops!r} is not a share in (0, 1]; 0.6 asks for 60 % of the unreduced encoder's FLOPs"
        )
    with ExitStack() as undo, torch.enable_grad():
        learner = _Learner(model, undo)
        with torch.no_grad():
            dense = [learner.run(batch) for batch in held]
        if len({(now.tokens, now.prefix) for _, now in dense}) > 1:
            raise ThriftError("learning rates needs images of one size: resize or crop them first")
        learner.start(dense[0][1], flops)
        targets = [features for features, _ in dense]
        optimiser = torch.optim.AdamW(learner.parameters, lr=lr, weight_decay=0)
        generator = torch.Generator().manual_seed(seed)
        before = learner.mean_loss(held, targets)
        order: list[int] = []
        for step in range(steps):
            order = order or torch.randperm(len(held), generator=generator).tolist()
            i = order.pop()
            loss = learner.loss(held[i], targets[i]) + FLOPS_WEIGHT * (learner.flops() - flops) ** 2
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if progress is not None:
                progress(step + 1, steps)
        prune, merge = learner.numbers()
        return {
            "model": _name(model),
            "tokens": learner.tokens,
            "prune": prune,
            "merge": merge,
            "flops": round(float(learner.flops().detach()), 6),
            "loss": [round(before, 6), round(learner.mean_loss(held, targets), 6)],
        }


def write_rates(schedule: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write what :func:`learn_rates` returned to a JSON file."""
    Path(path).write_text(json.dumps(dict(schedule)) + "\n", encoding="utf-8")


def _name(model: nn.Module) -> str:
    """Its id on the hub, or its class: where its files lie on this machine is nobody's business."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    return type(model).__name__ if not name or Path(name).is_absolute() or Path(name).exists() else name


class _Forward:
    """One forward of the encoder."""

    def __init__(self) -> None:
        self.tokens = self.patches = self.live = 0
        """At the start, prefix included; without it; and left by now."""
        self.mask = self.sizes = self.importance = torch.empty(0)
        """``(batch, tokens)``: 1 for tokens that are left, with gradient; sizes; the attention of this layer."""
        self.owner = torch.empty(0, dtype=torch.int64)
        """``(batch, tokens)``: the token whose features each one has in the end, -1 for pruned ones."""
        self.merged: Tensor | None = None
        """What merging has added to the features of the layer that runs."""

    @property
    def prefix(self) -> int:
        return self.tokens - self.patches


class _Learner:
    """The hooks on the encoder, and the parameters: ``theta[layer] = (prune, merge)``, none for the first layer."""

    def __init__(self, model: nn.Module, undo: ExitStack) -> None:
        adapter = EncoderAdapter(model)
        self.encoder, family, layers = adapter.encoder, adapter.family, adapter.layers
        if family.patches is None:
            raise ThriftError(f"{type(model).__name__} encodes texts: rates are learned for encoders of images")
        self.layers = layers
        self.attentions = [part(layer, family.attention) for layer in layers]
        self.theta: list[tuple[Tensor, Tensor]] = []
        self.costs: list[LayerCost] = []
        self.heads = [(0, 0)] * len(layers)
        """Per layer: heads, and channels of a head."""
        self.now = _Forward()
        self.patch_embedding = part(self.encoder, family.patches)
        self.tokens = self.prefix = 0

        self._freeze(undo)
        index = {id(a): i for i, a in enumerate(self.attentions)}
        replace_attention(self.attentions, lambda a: partial(self._attend, index[id(a)]), undo)
        for hook in (
            self.patch_embedding.register_forward_hook(self._see_patches),
            *(layer.register_forward_pre_hook(partial(self._enter, i)) for i, layer in enumerate(layers)),
            *(part(la, family.norm).register_forward_pre_hook(partial(self._reduce, i)) for i, la in enumerate(layers)),
            *(layer.register_forward_hook(self._leave) for layer in layers),
        ):
            undo.callback(hook.remove)

    def _freeze(self, undo: ExitStack) -> None:
        """Until ``undo`` closes: no dropout, and no gradients for the weights."""
        for module in self.encoder.modules():
            undo.callback(setattr, module, "training", module.training)
            module.training = False
        for parameter in self.encoder.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)

    # ---- the schedule -----------------------------------------------------------------------------------------------

    def start(self, dense: _Forward, flops: float) -> None:
        """Parameters whose numbers cost this share of the FLOPs, each layer keeping the same share of its tokens."""
        self.tokens, self.prefix, patches = dense.tokens, dense.prefix, dense.patches
        device = self.patch_embedding.weight.device
        self.costs = [
            LayerCost(
                attention=linear_flops(attention),
                pair=attention_flops(1, 1, heads, dim),
                mlp=linear_flops(layer) - linear_flops(attention),
            )
            for layer, attention, (heads, dim) in zip(self.layers, self.attentions, self.heads, strict=True)
        ]
        self.fixed = 2 * self.patch_embedding.weight.numel() * patches
        self.candidates = candidates(patches).to(device)

        def even(share: float) -> list[tuple[Tensor, Tensor]]:
            after = [max(patches * share**layer, 1.0) for layer in range(len(self.layers))]
            return [
                (torch.tensor(self.prefix + (a + b) / 2), torch.tensor(self.prefix + b))
                for a, b in zip([float(patches), *after], after, strict=False)
            ]

        least = float(self._share(even(0.0)))
        if flops < least:
            raise ThriftError(f"flops={flops} is out of reach: the first layer alone costs {least:.2f}; write more")
        share = _bisect(lambda share: float(self._share(even(share))), flops)
        self.theta = [
            (self._tilted(float(prune) - self.prefix), self._tilted(float(merge) - self.prefix))
            for prune, merge in even(share)[1:]
        ]

    def _tilted(self, mean: float) -> Tensor:
        """Parameters whose mean candidate is this: the flattest distribution that has it, ``theta ~ candidate``."""
        scaled = self.candidates / self.candidates[0]

        def mean_of(tilt: float) -> float:
            return float((tilt * scaled).softmax(-1) @ self.candidates)

        return (_bisect(mean_of, mean, -1e3, 1e3) * scaled).requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        return [t for pair in self.theta for t in pair]

    def _kept(self) -> list[tuple[Tensor, Tensor]]:
        every = torch.tensor(float(self.tokens), device=self.candidates.device)
        return [
            (every, every),
            *((self._number(prune), self._number(merge)) for prune, merge in self.theta),
        ]

    def _number(self, theta: Tensor) -> Tensor:
        return kept_number(theta, self.candidates, self.prefix)

    def flops(self) -> Tensor:
        """Of the schedule, as a share of the encoder without reduction."""
        return self._share(self._kept())

    def _share(self, kept: list[tuple[Tensor, Tensor]]) -> Tensor:
        every = torch.tensor(float(self.tokens))
        dense = encoder_flops(self.tokens, [(every, every)] * len(self.costs), self.costs)
        return (encoder_flops(self.tokens, kept, self.costs) + self.fixed) / (float(dense) + self.fixed)

    def numbers(self) -> tuple[list[int], list[int]]:
        """Tokens kept after pruning and after merging, as they come about: none is above one before it."""
        prune, merge, live = [], [], self.tokens
        for pruned, merged in self._kept():
            prune.append(min(live, int(pruned)))
            merge.append(live := min(prune[-1], int(merged)))
        return prune, merge

    # ---- the loss ---------------------------------------------------------------------------------------------------

    def run(self, batch: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, _Forward]:
        """The last hidden state, with all tokens in place."""
        forward = getattr(self.encoder, "forward_features", self.encoder)  # timm's models return logits
        out = forward(**batch) if isinstance(batch, Mapping) else forward(batch)
        return getattr(out, "last_hidden_state", out), self.now

    def loss(self, batch: Tensor | Mapping[str, Tensor], target: Tensor) -> Tensor:
        """1 - cosine to the unreduced features, of the class token and of the restored patches, in equal parts.

        A patch that is gone is restored as ``TokenMap.unmerge`` does: with the features of the token it was merged
        into, or with zeros. The mask chooses between this and the patch's own features, and so learns from both.
        """
        features, now = self.run(batch)
        own = cosine_similarity(features, target, dim=-1)
        owner = now.owner.clamp(min=0).unsqueeze(-1).expand_as(features)
        restored = cosine_similarity(features.gather(1, owner), target, dim=-1) * (now.owner >= 0)
        cosine = now.mask * own + (1 - now.mask) * restored
        patches = cosine[:, now.prefix :].mean()
        return 1 - ((cosine[:, 0].mean() + patches) / 2 if now.prefix else patches)

    @torch.no_grad()
    def mean_loss(self, batches: list[Any], targets: list[Tensor]) -> float:
        return sum(float(self.loss(b, t)) for b, t in zip(batches, targets, strict=True)) / len(batches)

    # ---- hooks ------------------------------------------------------------------------------------------------------

    def _see_patches(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        self.now = _Forward()
        self.now.patches = out.shape[-1] * out.shape[-2]

    def _enter(self, i: int, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if i:
            return
        now, (batch, tokens, _), device = self.now, args[0].shape, args[0].device
        now.tokens = now.live = tokens
        now.mask = torch.ones(batch, tokens, device=device)
        now.sizes = torch.ones(batch, tokens, device=device)
        now.owner = torch.arange(tokens, device=device).repeat(batch, 1)

    def _attend(
        self, i: int, run: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        if mask is not None:
            raise ThriftError("learning rates does not work with an attention_mask: batch whole images")
        now = self.now
        self.heads[i] = (query.shape[1], query.shape[3])
        if not self.theta:
            return run(query, key, value, mask)
        scores = query.to(torch.float32) @ key.to(torch.float32).transpose(-1, -2) * scaling
        attention = masked_softmax(scores + now.sizes.log()[:, None, None, :], now.mask)
        now.importance = (attention[:, :, 0].mean(1) if now.prefix else attention.mean((1, 2))).detach()
        return attention.to(value.dtype) @ value

    def _reduce(self, i: int, norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Prune by masking; merge into the tokens that stay, which the MLP then sees."""
        now, h = self.now, args[0]
        if i == 0 or not self.theta:
            return None
        kept = tuple(self._number(theta) for theta in self.theta[i - 1])
        alive = now.mask.detach() > 0
        protected = (torch.arange(now.tokens, device=h.device) < now.prefix).expand(h.shape[:2])
        rank = rank_tokens(now.importance.masked_fill(~alive, -torch.inf), protected)
        left = [now.live]
        for theta, number in zip(self.theta[i - 1], kept, strict=True):
            if int(number) < left[-1]:
                survives = survival(theta, self.candidates, now.prefix, now.tokens)
                now.mask = now.mask * survival_mask(survives, int(number), left[-1])[rank]
            left.append(min(left[-1], int(number)))
        _, pruned_to, merged_to = left
        if merged_to == now.live:
            return None
        now.live = merged_to
        joins, similarity = prune_and_merge(h, rank, pruned_to, merged_to, protected)
        now.owner = torch.where(now.owner >= 0, joins.gather(1, now.owner.clamp(min=0)), -1)
        if merged_to == pruned_to:
            return None
        merged = self._merge(h, joins, similarity)
        now.merged = merged - h
        return (merged, *args[1:])

    def _merge(self, h: Tensor, joins: Tensor, similarity: Tensor) -> Tensor:
        """The features with those that join averaged into the tokens that stay; all others as they are."""
        now = self.now
        places = torch.arange(joins.shape[1], device=joins.device)
        gives = (joins >= 0) & (joins != places)
        taker = torch.where(gives, joins, 0)  # the prefix gets nothing: what is added there is zero
        sizes = torch.where(gives, now.sizes * similarity, now.sizes).clamp(min=1)
        now.sizes = sizes.scatter_add(1, taker, sizes * gives)
        count = torch.ones_like(sizes).scatter_add(1, taker, gives.to(sizes.dtype)).unsqueeze(-1)
        added = torch.zeros_like(h).scatter_add(1, taker.unsqueeze(-1).expand_as(h), h * gives.unsqueeze(-1))
        return ((h + added) / count).to(h.dtype)

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        # The layer added its MLP's output to the features of before the merge, which hooks cannot reach.
        merged, self.now.merged = self.now.merged, None
        return None if merged is None else out + merged


def _bisect(rises: Callable[[float], float], wanted: float, low: float = 0.0, high: float = 1.0) -> float:
    """Where a rising function comes nearest to a value."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rises(middle) < wanted else (low, middle)
    return (low + high) / 2
