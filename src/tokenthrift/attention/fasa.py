"""FASA: a few frequencies of the rotary embedding rank tokens almost as the whole head does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.view import View
from ..models.calibration import Calibration, calibration_for
from ..models.frequency_chunks import score_chunks
from ..ops.attention import group_mean
from ..ops.growing import Growing
from ..ops.topk import top_entries


@method(
    "fasa",
    stage="attention",
    paper="FASA: Frequency-aware Sparse Attention",
    arxiv="2602.03152",
    needs=("queries", "keys", "scaling", "mask", "layer", "memory"),
    status="partial",
)
class FASA:
    """Rank tokens by the dominant frequency chunks of a head, and read those that rank first.

    A frequency chunk is a pair of channels that the rotary embedding turns together; dominant are those whose own
    products with the query pick the most of the tokens that the whole head would pick. They are found once per model.
    Their part of the keys is kept a second time, side by side, so that ranking reads no more than that.

    Partial: the released code has a set of chunks for every query head; here the query heads that share a key/value
    head share one, so that it is stored once. Chunks are channels ``i`` and ``i + dim / 2``, as the paper has them and
    most models rotate them; the released code pairs ``2 i`` and ``2 i + 1`` on the same models.

    Args:
        budget: entries to read per head.
        keep: how many chunks of a head are dominant: a share of them, or a count; the authors take a quarter.
        dense: how many of the first layers read everything.
        heads: ``"group"``: the query heads that share a key/value head read the tokens that suit them on average,
            ``"query"``: each reads its own, as in the authors' code.
        chunks: a file that ``tokenthrift calibrate fasa`` wrote; "auto" takes what comes with this library, for
            smollm2-135m; or the dominant chunks themselves, a list for each key/value head of each layer without a
            sliding window.

    Raises:
        ThriftError: a parameter outside its range, a file that is no calibration; when it is applied: a calibration of
            another model, none for this one, or chunks that it does not have.
    """

    budget: int = 512
    keep: int | float = 0.25
    dense: int = 1
    heads: str = "group"
    chunks: Any = "auto"

    def __post_init__(self) -> None:
        Budget.of(self.budget)
        Budget.of(self.keep)
        if self.dense < 0:
            raise ThriftError(f"fasa needs dense >= 0, the number of layers that read everything, got {self.dense}")
        if self.heads not in ("group", "query"):
            raise ThriftError(f"fasa knows heads='group' and heads='query', got '{self.heads}'")
        if isinstance(self.chunks, str):
            if self.chunks != "auto":
                Calibration.load(self.chunks, "fasa")  # whether there is such a file, while the plan is read
        elif not _are_chunks(self.chunks):
            raise ThriftError(
                "fasa needs chunks as a file, 'auto', or for every layer and key/value head a list of as many "
                f"different chunks, such as [[[0, 5], [2, 3]]], got {self.chunks!r}"
            )

    def bind(self, model: Any) -> FASA:
        """Itself, with the dominant chunks of this model."""
        if not isinstance(self.chunks, str):
            return self
        found = calibration_for("fasa", model, None if self.chunks == "auto" else self.chunks).data["agreement"]
        return replace(self, chunks=[[_best(head, self.keep) for head in layer] for layer in found if layer])

    @staticmethod
    def calibrate(
        model: Any, *, tokens: int = 1024, queries: int = 64, top: int = 128, seed: int = 0,
        ids: Tensor | None = None, progress: Callable[[int, int], None] | None = None,
    ) -> Calibration:  # fmt: skip
        """Score the model's chunks; see :func:`tokenthrift.models.frequency_chunks.score_chunks` for the options."""
        found = score_chunks(model, tokens=tokens, queries=queries, top=top, seed=seed, ids=ids, progress=progress)
        rounded = [[[round(x, 4) for x in head] for head in layer] for layer in found]
        data = {"tokens": tokens, "queries": queries, "top": top, "seed": seed, "agreement": rounded}
        return Calibration.of("fasa", model, data)

    def select(self, view: View) -> Tensor | None:
        if view.keys.shape[-2] <= self.budget or view.layer < self.dense:
            return None
        batch, kv_heads, _, dim = view.keys.shape
        channels = self._channels(view)
        known: Growing = view.memory.setdefault("dominant", Growing())
        fresh = view.keys[:, :, len(known) :]
        dominant = known.append(fresh.gather(-1, channels.expand(batch, -1, fresh.shape[2], -1)))
        asked = view.queries.reshape(batch, kv_heads, -1, dim)
        asked = asked.gather(-1, channels.expand(batch, -1, asked.shape[2], -1)) * view.scaling
        scores = (asked @ dominant.mT).flatten(1, 2).to(torch.float32)
        if self.heads == "group":
            if view.mask is not None:
                scores = scores.masked_fill(~view.mask[:, None], float("-inf"))
            scores = group_mean(scores.softmax(-1), kv_heads)
        return top_entries(scores, self.budget, view.mask)

    def _channels(self, view: View) -> Tensor:
        """``(1, kv_heads, 1, 2 chunks)`` int64: the layer's dominant channels."""
        if "channels" not in view.memory:
            if isinstance(self.chunks, str):
                raise ThriftError("fasa must know the chunks: apply it to a model, or give chunks=[[[...], ...], ...]")
            kv_heads, half = view.keys.shape[1], view.keys.shape[-1] // 2
            of_layer = self.chunks[view.layer] if view.layer < len(self.chunks) else []
            if len(of_layer) != kv_heads or max(map(max, of_layer)) >= half:
                raise ThriftError(
                    f"the chunks given to fasa do not fit layer {view.layer} of those that select: it has {kv_heads} "
                    f"key/value heads of {half} chunks, counted from 0"
                )
            first = torch.tensor(of_layer, device=view.keys.device).unsqueeze(1)
            view.memory["channels"] = torch.cat([first, first + half], dim=-1).unsqueeze(0)
        channels: Tensor = view.memory["channels"]
        return channels


def _best(agreement: list[float], keep: int | float) -> list[int]:
    """The chunks that agree most with their head, in order."""
    order = sorted(range(len(agreement)), key=lambda i: -agreement[i])
    return sorted(order[: Budget.of(keep).tokens(len(order))])


def _are_chunks(value: Any) -> bool:
    """Whether it is ``[layer][kv_head][chunk]`` of whole numbers, the heads of a layer of one length."""
    try:
        return bool(value) and all(
            bool(layer)
            and len({len(head) for head in layer}) == 1
            and all(len(set(head)) == len(head) > 0 and all(type(c) is int and c >= 0 for c in head) for head in layer)
            for layer in value
        )
    except TypeError:
        return False
