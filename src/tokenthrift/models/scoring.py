"""Small models that judge text: a causal language model for self-information, an encoder for sentence embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from ..core.errors import ThriftError
from ..ops.tokens import Span, encode, token_spans
from .decoder import context_length
from .replacing import plain_forward

if TYPE_CHECKING:
    from .reading import Reading


class Scorer:
    """Self-information of every token of a text under a causal language model.

    The first token of a segment is conditioned on the token that starts documents (see :func:`document_start`), or is
    given ``ln(vocabulary size)`` where there is none. Segments longer than ``window`` tokens are scored in windows that
    overlap: each token is then conditioned on at least ``overlap`` tokens before it. So a text may be of any length.

    Args:
        model: a ``transformers`` causal language model. It is only called, never changed; hooks on the model itself
            do not run, so that a session does not count scoring among the user's own forwards.
        tokenizer: its fast tokenizer.
        window: tokens per forward, at most what the model's positions allow.
        overlap: tokens of a window that only serve as context.
        batch_tokens: how many tokens, padding included, go through the model at once; None = 1,024 on a CPU, where
            more is slower, and 16,384 elsewhere.
        progress: called with (tokens done, tokens in all) after every batch.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        window: int = 1024,
        overlap: int = 256,
        batch_tokens: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
            raise ThriftError(f"{type(model).__name__} gives no token probabilities: a scorer needs a causal LM")
        self.model = model
        self.tokenizer = tokenizer
        self.window = min(window, context_length(model) or window)
        self.overlap = min(overlap, self.window // 2)
        self.batch_tokens = batch_tokens or (1024 if model.device.type == "cpu" else 16384)
        self.progress = progress
        self.prefix = document_start(tokenizer)

    def token_spans(self, text: str) -> list[Span]:
        """The characters that each token covers, without gaps."""
        return token_spans(self.tokenizer, text)

    @torch.inference_mode()
    def self_information(self, text: str, segments: Sequence[Span] | None = None) -> list[tuple[int, int, float]]:
        """``(start, end, -ln p)`` of every token, in nats, its characters counted in ``text``.

        Args:
            text: any length.
            segments: spans that are tokenised and scored each on its own, e.g. sentences; None = the whole text. White
                space at the end of one is not scored, and belongs to its last token.
        """
        segments = [(0, len(text))] if segments is None else segments
        pieces = [text[start:end] for start, end in segments]
        encoded = encode(self.tokenizer, [piece.rstrip() or piece for piece in pieces])
        for (_, spans), piece in zip(encoded, pieces, strict=True):
            if spans:
                spans[-1] = (spans[-1][0], len(piece))
        nats = [torch.empty(len(ids)) for ids, _ in encoded]

        windows = [(row, *window) for row, (ids, _) in enumerate(encoded) for window in self._windows(len(ids))]
        total, done = sum(len(ids) for ids, _ in encoded), 0
        for batch in self._batches(windows):
            scored = self._score([encoded[row][0][start:end] for row, start, _, end in batch])
            for (row, start, fresh, end), values in zip(batch, scored, strict=True):
                nats[row][fresh:end] = values[fresh - start : end - start]
                done += end - fresh
            if self.progress is not None:
                self.progress(done, total)
        return [
            (origin + start, origin + end, value)
            for (origin, _), (_, spans), values in zip(segments, encoded, nats, strict=True)
            for (start, end), value in zip(spans, values.tolist(), strict=True)
        ]

    def _windows(self, length: int) -> Iterator[tuple[int, int, int]]:
        """``(start, first token to score, end)`` of the windows over a segment; one place is for the prefix."""
        room = self.window - 1
        fresh = 0
        while fresh < length:
            start = max(0, fresh - self.overlap)
            end = min(start + room, length)
            yield start, fresh, end
            fresh = end

    def _batches(self, windows: list[tuple[int, int, int, int]]) -> Iterator[list[tuple[int, int, int, int]]]:
        """Windows of similar length together, longest first, at most ``batch_tokens`` with their padding."""
        by_length = sorted(windows, key=lambda w: w[1] - w[3])
        at = 0
        while at < len(by_length):
            longest = by_length[at][3] - by_length[at][1] + 1
            rows = max(1, self.batch_tokens // longest)
            yield by_length[at : at + rows]
            at += rows

    def _score(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Self-information of each row's tokens, on the CPU."""
        lengths = [len(row) for row in rows]
        first = self.prefix if self.prefix is not None else rows[0][0]
        ids = torch.full((len(rows), max(lengths) + 1), first)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, 1 : len(row) + 1] = torch.tensor(row)
            mask[i, : len(row) + 1] = 1
        if self.prefix is None:  # the row's own first token stands at the front, and is given no score
            ids, mask = ids[:, 1:], mask[:, 1:]
        device = self.model.device
        nats = self._next_token_nats(ids.to(device), mask.to(device)).cpu()
        if self.prefix is None:
            vocabulary = self.model.get_output_embeddings().weight.shape[0]
            nats = torch.cat([torch.full((len(rows), 1), math.log(vocabulary)), nats], dim=1)
        return [nats[i, :length] for i, length in enumerate(lengths)]

    def _next_token_nats(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``-ln p(ids[:, t + 1] | ids[:, : t + 1])``."""
        states = self.states(input_ids=ids, attention_mask=mask, use_cache=False)[:, :-1].flatten(0, 1)
        return self.nats(states, ids[:, 1:].flatten()).view(len(ids), -1)

    def states(self, **inputs: Any) -> Tensor:
        """What :meth:`nats` takes: hidden states where the head is all that follows them, or else logits."""
        if self._head is None:
            return self._logits(**inputs)
        hidden: Tensor = self.model.base_model(**inputs)[0]
        return hidden

    def _logits(self, **inputs: Any) -> Tensor:
        """Of the model's own forward: a session's prefill stage puts another in its place, for the user's prompts."""
        logits: Tensor = plain_forward(self.model)(**inputs).logits
        return logits

    def nats(self, states: Tensor, targets: Tensor) -> Tensor:
        """``-ln p`` of each target given its state; no more logits at a time than :data:`LOGITS`."""
        if self._head is None:
            return cross_entropy(states.float(), targets, reduction="none")
        weight, bias = self._head.weight, self._head.bias
        # By parts of the vocabulary: those logits are still in the processor's cache when their exponents are summed.
        size = max(64, LOGITS["cpu" if states.device.type == "cpu" else "accelerator"] // max(len(states), 1))
        parts = [
            linear(states, w, None if bias is None else bias[i * size : (i + 1) * size]).float().logsumexp(-1)
            for i, w in enumerate(torch.split(weight, size))
        ]
        own = (states.float() * weight[targets].float()).sum(-1)
        own = own if bias is None else own + bias[targets].float()
        return (torch.stack(parts).logsumexp(0) - own).clamp(min=0)

    def reading(self, start: bool = True, known: tuple[Sequence[int], Tensor] | None = None) -> Reading:
        """Reads one text step by step, with a cache; with ``start`` behind the token that starts documents.

        Args:
            known: ids and their scores, which such a reading gave: see :class:`~tokenthrift.models.reading.Reading`.
        """
        from .reading import Reading

        return Reading(self, self.prefix if start else None, known)

    @cached_property
    def _head(self) -> Any:
        """The output head, if logits are nothing but the head of the hidden states; else (scaled, capped) None."""
        head, body = self.model.get_output_embeddings(), self.model.base_model
        plain_linear = type(head) is torch.nn.Linear and not hasattr(head, "_hf_hook")  # its weight is all there is
        if body is self.model or not plain_linear:
            return None
        probe = torch.arange(4, device=self.model.device).unsqueeze(0) % head.weight.shape[0]
        logits = self._logits(input_ids=probe, use_cache=False)
        plain = head(body(input_ids=probe, use_cache=False)[0])
        return head if torch.allclose(plain.float(), logits.float(), rtol=1e-3, atol=1e-3) else None


def document_start(tokenizer: Any) -> int | None:
    """The token that stood between documents in pre-training: ``<|endoftext|>``, or else BOS, or else EOS.

    Chat models declare ``<|im_start|>`` or the like as BOS, after which they expect the name of a role: every text
    would seem surprising.
    """
    named = tokenizer.get_added_vocab().get("<|endoftext|>")
    return next((i for i in (named, tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)


LOGITS = {"cpu": 2**20, "accelerator": 2**24}
"""Logits that exist at once: 4 MB in float32 on a CPU, which its cache holds, or else 64 MB."""


class Embedder:
    """Sentence embeddings of unit length: mean pooling over an encoder such as all-MiniLM-L6-v2.

    Args:
        model: a ``transformers`` encoder.
        tokenizer: its tokenizer.
        max_length: tokens at which texts are cut.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_length: int = 256) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length

    def embed(self, texts: Sequence[str], unit: bool = True) -> Tensor:
        """``(len(texts), dim)``, rows in the order given; without ``unit`` of the length that the mean has."""
        from .embeddings import embed

        return embed(texts, self.model, self.tokenizer, max_length=self.max_length, unit=unit)
