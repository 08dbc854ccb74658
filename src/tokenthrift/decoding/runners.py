"""Runners: one forward over what every row feeds, and the cache afterwards as if only the accepted tokens had been fed.

``PackedRunner`` takes trees and rows that accept different numbers of tokens. ``AlignedRunner`` takes chains of one
length that all rows accept equally far, on every model whose cache can be rolled back.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import QuantizedCache

from ..core.draft import Draft
from ..core.errors import ThriftError
from ..models.decoder import find_attentions
from ..models.depth import watching
from ..models.packed import PackedCache, Step, can_pack, packed_attention


class Runner(Protocol):
    """Holds the cache of a batch."""

    free: bool
    """Whether drafts may be trees, and rows may differ in what they feed and accept."""

    def forward(self, tokens: Sequence[int], drafts: Sequence[Draft | None]) -> list[Tensor]:
        """Feed each row its last committed token and its draft; a row with None feeds nothing.

        Returns, row by row, the logits ``(nodes + 1, vocabulary)``: at the last committed token, then at every node.
        """

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep, of what each row fed, the last committed token and these nodes."""

    def close(self) -> None:
        """Leave the user's cache with what was committed."""


def runner_of(model: Any, cache: Any, model_kwargs: dict[str, Any], input_ids: Tensor) -> Runner:
    """The runner for a model and its cache after the prefill.

    Raises:
        ThriftError: the cache cannot be rolled back.
    """
    modules = find_attentions(model)
    if can_pack(modules, cache):
        mask = model_kwargs.get("attention_mask")
        seen = int(cache.get_seq_length())
        if mask is None or (mask.dim() == 2 and mask.shape[1] >= seen):
            return PackedRunner(model, modules, cache, None if mask is None else mask[:, :seen].bool())
    return AlignedRunner(model, cache, model_kwargs, input_ids)


class PackedRunner:
    """All rows' tokens in one packed forward; see :mod:`tokenthrift.models.packed`."""

    free = True
    watched: Sequence[nn.Module] = ()
    """Modules whose outputs in the last forward are kept in :attr:`seen`, in the order in which they ran."""

    def __init__(self, model: Any, modules: Sequence[Any], cache: Any, real: Tensor | None) -> None:
        if real is not None and bool(real.all()):
            real = None
        self.seen: list[Tensor] = []
        self.model, self.modules = model, modules
        self.cache = PackedCache(cache, real)

    def forward(
        self, tokens: Sequence[int], drafts: Sequence[Draft | None], before: Sequence[int] | None = None
    ) -> list[Tensor]:
        """As said at :class:`Runner`. For drafts that grow, ``before`` says how many of each row's tokens, the last
        committed one included, earlier calls since the last commit have fed; logits are those of the others."""
        packing, device = self.cache.packing, self.model.device
        packing.step = step = Step(drafts, device, before)
        rows = zip(tokens, drafts, step.fed, strict=True)
        fed = [t for token, draft, n in rows if draft is not None for t in (token, *draft.tokens)[n:]]
        self.seen = []
        with packed_attention(self.modules, self.cache), watching(self.watched, self.seen):
            out = self.model(
                input_ids=torch.tensor([fed], device=device),
                position_ids=torch.tensor([packing.positions()], device=device),
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
            )
        return list(out.logits[0].split(step.widths))

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        self.cache.keep(paths)

    def close(self) -> None:
        self.cache.give_back()


class AlignedRunner:
    """The model's own inputs and cache, rolled back by ``crop``."""

    free = False

    def __init__(self, model: Any, cache: Any, model_kwargs: dict[str, Any], input_ids: Tensor) -> None:
        self.model, self.cache, self.kwargs = model, cache, model_kwargs
        self.text = input_ids
        self.drafted = 0
        self._undo = ExitStack()
        if isinstance(cache, QuantizedCache) or not cache.is_croppable:
            kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers}))
            raise ThriftError(
                f"drafts need a cache that can be rolled back, this one ({kinds}) cannot: leave out "
                "cache_implementation, or generate without the decode stage"
            )
        # After the prefill: sliding windows then never keep more of the prompt than they must.
        for layer in cache.layers:
            if hasattr(layer, "record_past"):
                self._undo.callback(setattr, layer, "record_past", layer.record_past)
        cache.activate_past_recording()
        cache.crop(0)  # sliding windows shrink here

    def forward(self, tokens: Sequence[int], drafts: Sequence[Draft | None]) -> list[Tensor]:
        fed = [
            [token, *([0] * 0 if draft is None else draft.tokens)] for token, draft in zip(tokens, drafts, strict=True)
        ]
        width = max(map(len, fed))
        fed = [row + [row[-1]] * (width - len(row)) for row in fed]  # rows that are done feed anything
        self.drafted = width - 1
        self.kwargs = self._grown(1)
        self.text = torch.cat([self.text, self.text.new_tensor(fed)], dim=1)
        kwargs = self._grown(self.drafted) if self.drafted else self.kwargs
        inputs = self.model.prepare_inputs_for_generation(self.text, next_sequence_length=width, **kwargs)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = width
        return list(self.model(**inputs, return_dict=True).logits[:, -width:])

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        accepted = min(len(path) for path in paths)
        rejected = self.drafted - accepted
        self.cache.crop(-rejected)
        self.text = self.text[:, : self.text.shape[1] - rejected]
        if accepted:
            self.kwargs = self._grown(accepted)

    def close(self) -> None:
        self._undo.close()

    def _grown(self, tokens: int) -> dict[str, Any]:
        """The model's inputs with attention mask, position ids and token types that cover ``tokens`` more tokens."""
        grown: dict[str, Any] = self.model._update_model_kwargs_for_generation(
            {}, dict(self.kwargs), is_encoder_decoder=False, num_new_tokens=tokens
        )
        return grown
