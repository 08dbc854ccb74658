"""Which tokens of a draft model are which tokens of the target, by their strings where the two differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ThriftError
from ..models.vocabularies import other_vocabulary, same_vocabulary, size_of, strings_of

LEAST = 0.5
"""Vocabularies with a smaller share of the draft model's tokens in common cannot be mapped."""


class Vocabulary:
    """Translates tokens of the target to the draft model's, and the draft model's logits to the target's vocabulary.

    Attributes:
        size: tokens of the target.
        columns: of each token of the draft model, the target's; -1 where there is none.
    """

    def __init__(self, size: int, columns: Sequence[int]) -> None:
        self.size = size
        self.columns = torch.tensor(columns)
        self._drafts = {token: own for own, token in enumerate(columns) if 0 <= token < size}
        self._places: tuple[Tensor, Tensor] | None = None
        self._equal = list(columns) == list(range(size))

    def encode(self, tokens: Sequence[int]) -> list[int]:
        """The draft model's tokens; 0 stands for those that it does not know."""
        return [self._drafts.get(token, 0) for token in tokens]

    def keep(self, tokens: set[int]) -> list[int]:
        """From now on logits are those of these of the target's tokens alone; returns them as the draft model's."""
        kept = [own for own, token in enumerate(self.columns.tolist()) if token in tokens]
        self.columns, self._places, self._equal = self.columns[kept], None, False
        return kept

    def spread(self, logits: Tensor) -> Tensor:
        """``(n, draft tokens)`` to ``(n, size)``: minus infinity where the draft model has no such token."""
        if self._equal:
            return logits
        if self._places is None:
            [known] = ((self.columns >= 0) & (self.columns < self.size)).nonzero(as_tuple=True)
            self._places = (known.to(logits.device), self.columns[known].to(logits.device))
        known, target = self._places
        wide = logits.new_full((len(logits), self.size), -torch.inf)
        wide[:, target] = logits[:, known]
        return wide


def match(
    target: Any, draft: Any, tokenizer: Any, draft_tokenizer: Any, *, same: bool, method: str = "decode"
) -> Vocabulary:
    """How the vocabularies of two models correspond.

    By the strings of their tokenizers; see :func:`tokenthrift.models.vocabularies.same_vocabulary` for where there are
    none.

    Args:
        target, draft: the models.
        tokenizer, draft_tokenizer: theirs, or None.
        same: do not ask: equal numbers are equal tokens, and the model with more of them has padding.
        method: for errors.

    Raises:
        ThriftError: too few tokens in common, or nothing to tell them by.
    """
    size, own = size_of(target), size_of(draft)
    if same or draft is target:
        return Vocabulary(size, range(own))
    target_strings, draft_strings = strings_of(target, tokenizer), strings_of(draft, draft_tokenizer)
    if target_strings is None or draft_strings is None:
        if same_vocabulary(target, draft, tokenizer, draft_tokenizer):
            return Vocabulary(size, range(own))
        advice = (
            "to map them by their strings, give tt.apply(..., processor=TOKENIZER) and the draft method "
            "tokenizer=DRAFT_TOKENIZER; if only padding differs, vocabulary='same'"
        )
        raise ThriftError(other_vocabulary(method, target, draft, advice))
    if target_strings == draft_strings:
        return Vocabulary(size, range(own))
    columns = [-1] * own
    for string, token in draft_strings.items():
        if token < own:
            columns[token] = target_strings.get(string, -1)
    end, own_end = (getattr(each, "eos_token_id", None) for each in (tokenizer, draft_tokenizer))
    if end is not None and own_end is not None and columns[own_end] < 0:
        columns[own_end] = end  # whatever they are called
    common = sum(0 <= token < size for token in columns)
    if common < LEAST * len(draft_strings):
        advice = (
            f"it shares {common:,} of its {len(draft_strings):,} tokens with the target, too few to draft with: choose "
            "a draft model of the same tokenizer"
        )
        raise ThriftError(other_vocabulary(method, target, draft, advice))
    return Vocabulary(size, columns)


class TrimmedHead:
    """While this is entered, a model computes the logits of some tokens alone, in their order. Can be entered again.

    Raises:
        ThriftError: the model's output layer is no linear layer.
    """

    def __init__(self, model: Any, tokens: Sequence[int]) -> None:
        full = model.get_output_embeddings()
        if not isinstance(full, nn.Linear):
            raise ThriftError(f"the output layer of {type(model).__name__} cannot be trimmed: leave out trim")
        rows = torch.tensor(tokens, device=full.weight.device)
        small = nn.Linear(full.in_features, len(tokens), bias=full.bias is not None, device="meta")
        small.weight = nn.Parameter(full.weight.detach()[rows], requires_grad=False)
        if full.bias is not None:
            small.bias = nn.Parameter(full.bias.detach()[rows], requires_grad=False)
        self.model, self.full, self.small = model, full, small

    def __enter__(self) -> None:
        self.model.set_output_embeddings(self.small)

    def __exit__(self, *error: Any) -> None:
        self.model.set_output_embeddings(self.full)
