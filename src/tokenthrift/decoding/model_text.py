"""The text of a batch in a draft model's own cache, rows of any lengths, with the trees that grow on them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..core.draft import ROOT, Draft
from ..core.errors import ThriftError
from ..models.decoder import find_attentions
from ..models.packed import can_pack
from .growing import Tree
from .runners import PackedRunner


class ModelText:
    """What a draft model has read: of every row the committed tokens, and the nodes of a tree as far as it was asked.

    All tokens are the draft model's.

    Args:
        model: the draft model.
        texts: of each row, at least one token.

    Raises:
        ThriftError: the model cannot take rows of different lengths and trees.
    """

    def __init__(self, model: Any, texts: Sequence[Sequence[int]]) -> None:
        self.runner = PackedRunner(model, *_read(model, [text[:-1] for text in texts]))
        self._waiting = [list(text[-1:]) for text in texts]  # committed, but not in the cache
        self._fed = [0] * len(texts)  # tokens in the cache that are not committed there: those that waited, and nodes
        self._drafts: list[Draft | None] = [None] * len(texts)  # the same, below the first
        self._places: list[dict[int, int]] = [{} for _ in texts]  # from a row's tree to its draft

    def ask(
        self, wanted: Mapping[int, Sequence[int]], nodes: Mapping[int, Sequence[int]], trees: Mapping[int, Tree]
    ) -> list[Tensor]:
        """The logits ``(wanted, draft vocabulary)`` after some nodes of some rows, in one forward.

        Args:
            wanted: by row the nodes, parents first; the first call after :meth:`extend` wants ``[ROOT]``.
            nodes: by row, their tokens; not read of the root.
            trees: by row.
        """
        before = list(self._fed)
        for row, asked in wanted.items():
            waiting, places = self._waiting[row], self._places[row]
            draft = self._drafts[row] or Draft()
            tokens, parents = list(draft.tokens), list(draft.parents)
            if not self._fed[row]:
                tokens, parents = waiting[1:], list(range(ROOT, len(waiting) - 2))
                places[ROOT] = len(waiting) - 2
            for node, token in zip(asked, nodes[row], strict=True):
                if node != ROOT:
                    parents.append(places[trees[row].parents[node]])
                    places[node] = len(tokens)
                    tokens.append(token)
            self._drafts[row] = Draft(tokens, parents)
            self._fed[row] = len(tokens) + 1
        first = [waiting[0] if waiting else 0 for waiting in self._waiting]
        logits = self.runner.forward(first, self._drafts, before)
        return [logits[row][-len(asked) :] for row, asked in wanted.items()]

    def extend(self, tokens: Sequence[Sequence[int]], paths: Sequence[Sequence[int]]) -> None:
        """Commit ``tokens``, row by row; the first of them stood in the nodes ``paths`` of the row's tree."""
        kept: list[list[int]] = []
        for row, (new, path) in enumerate(zip(tokens, paths, strict=True)):
            kept.append([])
            known = 0
            if self._fed[row]:
                kept[row] = list(range(len(self._waiting[row]) - 1))
                for node in path[: len(new) - 1]:  # the last token is read again, for what follows it
                    if node not in self._places[row]:
                        break
                    kept[row].append(self._places[row][node])
                    known += 1
                self._waiting[row] = []
            self._waiting[row] += new[known:]
        if any(self._fed):
            self.runner.commit(kept)
        self._fed = [0] * len(tokens)
        self._drafts = [None] * len(tokens)
        self._places = [{} for _ in tokens]


def _read(model: Any, texts: Sequence[Sequence[int]]) -> tuple[list[Any], DynamicCache, Tensor]:
    """A model's attention modules, its cache after these texts, padded on the left, and what of it is no padding."""
    longest = max(1, *map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts])
    real = torch.arange(longest) >= longest - torch.tensor([[len(text)] for text in texts])
    seen = real.clone()
    seen[:, -1] = True  # attention over nothing has no value; of an empty text the model reads a token that is hidden
    cache = DynamicCache(config=model.config)
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    model(
        input_ids=ids.to(model.device),
        attention_mask=seen.long().to(model.device),
        position_ids=(seen.long().cumsum(1) - 1).clamp_min(0).to(model.device),
        past_key_values=cache,
        use_cache=True,
        **options,
    )
    modules = find_attentions(model)
    if not can_pack(modules, cache):
        raise ThriftError(
            f"{type(model).__name__} cannot draft: its cache takes no trees and rows of different lengths; choose a "
            "draft model with attention in every layer"
        )
    return modules, cache, real.to(model.device)
