"""Reading a text that is rewritten on the way: how surprising its last tokens are, with a cache of what stays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import OwnCache
from .decoder import context_length

if TYPE_CHECKING:
    from .scoring import Scorer


class Reading:
    """The tokens of one text under a scorer's model, most of them read only once.

    Every call of :meth:`surprise` gives the whole text as it is by then. What it has in common with the text of the
    call before is neither read nor scored again; only what comes behind is computed.

    Args:
        scorer: whose model reads.
        first: the token before all others, or None: the first token of a text is then as surprising as one drawn
            blindly, ``ln(vocabulary size)``.
        known: the ids of a text and what :meth:`surprise` gave for all of them: not scored again where a text starts
            like it.
    """

    def __init__(self, scorer: Scorer, first: int | None, known: tuple[Sequence[int], Tensor] | None = None) -> None:
        self.scorer = scorer
        self.first = first
        self._stateful = getattr(scorer.model, "_is_stateful", False)  # a recurrent state cannot be cut
        # A cache without the model's config keeps every token, in layers with a sliding window too: it can be cut.
        self._new_cache = partial(OwnCache, config=scorer.model.config) if self._stateful else OwnCache
        self._cache = self._new_cache()
        ids, nats = ([], torch.zeros(0)) if known is None else known
        # What was read last, and what is known of each of its ids: nan where nobody asked.
        self._ids = [*ids] if first is None else [first, *ids]
        self._nats = torch.cat([torch.full((len(self._ids) - len(nats),), torch.nan), nats])
        self._cached = 0  # how many of the ids the cache holds

    @property
    def limit(self) -> int | None:
        """How many tokens the model's positions allow, the first included; None: any number."""
        return context_length(self.scorer.model)

    @torch.inference_mode()
    def surprise(self, ids: Sequence[int], last: int, fixed: int = 0) -> Tensor:
        """``-ln p`` of the last so many tokens of ``ids``, each given all before it, on the CPU.

        Where there are more tokens than the model has positions, those behind the first ``fixed`` are forgotten, half
        of the room at a time, so that what is cached holds for many calls.
        """
        ids = self._shortened(list(ids), fixed)
        last = min(last, len(ids))
        if last == 0:
            return torch.zeros(0)
        if self.first is not None:
            ids = [self.first, *ids]
        same = 0 if self._stateful else _common(self._ids, ids)
        nats = torch.full((len(ids),), torch.nan)
        nats[0] = math.log(self.scorer.model.get_output_embeddings().weight.shape[0])  # nothing predicts the very first
        nats[:same] = self._nats[:same]
        unknown = nats[-last:].isnan().nonzero()
        if len(unknown):
            self._read(ids, nats, same, len(ids) - last + int(unknown[0]))
        return nats[-last:]

    def _read(self, ids: list[int], nats: Tensor, same: int, first: int) -> None:
        """Score the ids from ``first`` on; ``same`` of them were there before."""
        # The token before the first that is asked for has to be read again: its state is what predicts.
        known = min(self._cached, same, first - 1)
        if known == 0:
            self._cache = self._new_cache()
        elif known < self._cached:
            self._cache.crop(known - self._cached)  # a negative number says how many tokens go
        fed = torch.tensor([ids[known:]], device=self.scorer.model.device)
        states = self.scorer.states(input_ids=fed[:, :-1], past_key_values=self._cache, use_cache=True)[0]
        wanted = len(ids) - first
        nats[first:] = self.scorer.nats(states[-wanted:], fed[0, -wanted:]).float().cpu()
        self._ids, self._nats, self._cached = ids, nats, len(ids) - 1

    def _shortened(self, ids: list[int], fixed: int) -> list[int]:
        room = None if self.limit is None else self.limit - (self.first is not None)
        if room is None or len(ids) <= room:
            return ids
        fixed = min(fixed, room // 2)
        step = max(1, (room - fixed) // 2)
        drop = math.ceil((len(ids) - room) / step) * step
        return ids[:fixed] + ids[fixed + drop :]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common from their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
