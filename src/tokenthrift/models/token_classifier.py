"""Token classifiers that say of every token whether to keep it: any encoder with two labels and a fast tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ThriftError
from ..ops.tokens import Span, encode


class TokenClassifier:
    """Probability of being kept, of every token of a text of any length.

    Long texts are cut where a sentence ends, and the pieces go through the model in batches of similar length, without
    more padding than that takes.

    Args:
        model: a ``transformers`` model for token classification.
        tokenizer: its fast tokenizer.
        window: tokens per forward, special ones included; at most what the model's positions allow.
        batch_tokens: tokens in a batch, padding included.
        keep: the label that means keeping.
        progress: called with (tokens done, tokens in all) after every batch.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        window: int = 512,
        batch_tokens: int = 8192,
        keep: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        classifies = hasattr(model, "classifier") or "ForTokenClassification" in type(model).__name__
        if not classifies or getattr(model.config, "num_labels", 0) <= keep:
            raise ThriftError(f"{type(model).__name__} has no label {keep}: give a token classifier with two labels")
        self.model, self.tokenizer = model, tokenizer
        # RoBERTa-type encoders begin to count positions behind the number of their padding token.
        reserved = (getattr(model.config, "pad_token_id", 0) or 0) + 1 if "oberta" in model.config.model_type else 0
        positions = getattr(model.config, "max_position_embeddings", None)
        self.window = min(window, positions - reserved) if positions else window
        self.batch_tokens = batch_tokens
        self.keep = keep
        self.progress = progress

    def __repr__(self) -> str:
        return f"<{type(self.model).__name__}>"

    @cached_property
    def specials(self) -> tuple[list[int], list[int]]:
        """The special tokens before and behind a text."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return whole[:at], whole[at + len(bare) :]

    @property
    def room(self) -> int:
        """Tokens of a text that fit into a window."""
        return self.window - sum(map(len, self.specials))

    def probabilities(self, text: str) -> list[tuple[int, int, float]]:
        """``(start, end, p)`` of every token."""
        ids, spans = encode(self.tokenizer, [text])[0]
        ends = [text[end - 1 : end] in ".!?。！？\n" for _, end in spans]
        pieces = [ids[start:end] for start, end in chunks(ends, self.room)]
        kept = torch.cat([torch.zeros(0), *self.of_pieces(pieces)]).tolist()
        return [(start, end, p) for (start, end), p in zip(spans, kept, strict=True)]

    @torch.inference_mode()
    def of_pieces(self, pieces: Sequence[Sequence[int]]) -> list[Tensor]:
        """The probabilities of each piece of tokens, which is read on its own.

        A piece of more tokens than there is room for loses special tokens behind it first, like in the authors' code.
        """
        before, behind = self.specials
        rows = [[*before, *piece, *behind][: self.window] for piece in pieces]
        out = [torch.zeros(len(piece)) for piece in pieces]
        done, total = 0, sum(map(len, pieces))
        for batch in self._batches(list(map(len, rows))):
            width = max(len(rows[i]) for i in batch)
            ids = torch.full((len(batch), width), self.tokenizer.pad_token_id or 0)
            mask = torch.zeros_like(ids)
            for place, i in enumerate(batch):
                ids[place, : len(rows[i])] = torch.tensor(rows[i])
                mask[place, : len(rows[i])] = 1
            device = self.model.device
            logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            if logits.ndim != 3:
                raise ThriftError(f"{type(self.model).__name__} does not classify tokens, but whole texts")
            kept = logits.float().softmax(-1)[..., self.keep].cpu()
            for place, i in enumerate(batch):
                found = kept[place, len(before) : len(before) + len(pieces[i])]
                out[i][: len(found)] = found
                done += len(pieces[i])
            if self.progress is not None:
                self.progress(done, total)
        return out

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        at = 0
        while at < len(order):
            count = max(1, self.batch_tokens // max(lengths[order[at]], 1))
            yield order[at : at + count]
            at += count


def chunks(ends: Sequence[bool], room: int) -> list[Span]:
    """Pieces of at most ``room`` tokens, each up to the last token that may end one, if any does.

    Args:
        ends: true for tokens that a piece may end with.
    """
    found: list[Span] = []
    start = 0
    while start < len(ends):
        stop = min(start + room, len(ends))
        if stop < len(ends):
            stop = next((at + 1 for at in range(stop - 1, start, -1) if ends[at]), stop)
        found.append((start, stop))
        start = stop
    return found


def as_classifier(method: str, model: Any) -> Any:
    """What a method keeps of the classifier that it was given: a name, or a :class:`TokenClassifier`.

    Raises:
        ThriftError: it is neither, nor a model with its tokenizer.
    """
    if isinstance(model, tuple | list) and len(model) == 2:
        return TokenClassifier(*model)
    if not isinstance(model, TokenClassifier) and not (isinstance(model, str | os.PathLike) and os.fspath(model)):
        raise ThriftError(f"{method} needs model as a folder, a hub id or (model, tokenizer), not {model!r}")
    return model


@lru_cache(maxsize=2)
def load_token_classifier(name: str) -> TokenClassifier:
    """The token classifier of a folder or hub id; kept for the next text.

    Raises:
        ThriftError: there is none of that name, or it classifies something else.
    """
    from .packs import load

    model, tokenizer = load(name)
    return TokenClassifier(model, tokenizer)
