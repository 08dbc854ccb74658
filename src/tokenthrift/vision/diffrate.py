"""DiffRate: prune the least important tokens, merge the next ones, as many in each layer as was learned."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.fusion import groups_of
from ..ops.matching import fewest_free
from ..ops.rates import prune_and_merge, rank_tokens
from ..ops.schedules import check_removal, to_remove

LEAST_SHARE = 1e-3
"""Of its size, that a merged token adds at least: similarities may be negative, and sizes must stay above 0."""


@method(
    "diffrate",
    stage="vision",
    paper="DiffRate: Differentiable Compression Rate for Efficient Vision Transformers",
    arxiv="2305.17997",
    needs=("features", "attention", "protected", "prefix", "grid", "tokens"),
)
class DiffRate:
    """Prune and merge fixed numbers of tokens between attention and MLP; training-free once the numbers are known.

    Tokens are ranked by the attention that the class token pays them, mean over the heads. The lowest are pruned; the
    lowest of the others are merged into the most similar of the tokens that stay (cosine of the features), as a plain
    mean. The size of a merged token counts only in proportion to its similarity. Encoders without a class token rank by
    the mean attention that a token receives, as the authors do in CAFormer; this computes whole attention maps. Not
    for causal encoders of texts: their first token sees nothing but itself, so that the earliest tokens would stay.

    ``models/learn_rates.py`` learns the numbers on images without labels and writes the file that ``schedule`` reads.

    Kept tokens stay in their order (the authors' code sorts them by importance). A similarity of 0 or less counts as
    0.001, where the authors' code subtracts it from the size and may take the logarithm of a negative one.

    Parameters:
        keep: without learned numbers, share of the patch tokens that is left after the last layer; all layers but the
            first share the work evenly, half by pruning and half by merging. This is no result of the paper.
        prune, merge: tokens kept after the pruning and after the merging of each layer, prefix included, one number a
            layer. Either alone leaves the other out. Numbers above what a layer has keep all.
        schedule: path of a JSON file ``{"prune": [...], "merge": [...], "tokens": n}``. For images of another size
            than the ``tokens`` it was learned with, its numbers are scaled.

    Raises:
        ThriftError: ``keep`` out of range, more than one kind of schedule, or numbers for another number of layers.
    """

    placement: ClassVar[Literal["between", "boundary", "around"]] = "between"

    keep: float = 0.5
    prune: list[int] | None = None
    merge: list[int] | None = None
    schedule: str | None = None
    prop_attn: bool = True

    def __post_init__(self) -> None:
        listed = self.prune is not None or self.merge is not None
        check_removal("diffrate", self.keep, None, type(self).keep)
        if (self.keep != type(self).keep) + listed + (self.schedule is not None) > 1:
            raise ThriftError("diffrate takes one of keep=..., schedule=..., or prune=... and merge=...")
        numbers = None
        if self.schedule is not None:
            numbers = _read(self.schedule)
        elif listed:
            prune = self.merge if self.prune is None else self.prune
            merge = self.prune if self.merge is None else self.merge
            numbers = _check({"prune": prune, "merge": merge}, "diffrate")
            if self.prune is None:
                numbers["prune"] = [sys.maxsize] * len(numbers["merge"])  # merging alone: no model has as many tokens
        object.__setattr__(self, "_numbers", numbers)

    def reduce(self, view: View) -> TokenMap | None:
        """The map of this layer; None where every token is kept."""
        tokens = view.features.shape[1]
        prune, merge = self._kept(view)
        if merge < tokens:
            # What is protected stays, and one more to receive what merges.
            merge = min(max(merge, tokens - fewest_free(view.protected) + 1), tokens)
            prune = max(prune, merge)
        if merge >= tokens:
            return None
        if view.prefix:
            importance = view.attention(slice(0, 1)).mean(1)[:, 0]
        else:
            importance = view.attention(slice(None)).mean((1, 2))
        rank = rank_tokens(importance, view.protected)
        joins, similarity = prune_and_merge(view.features, rank, prune, merge, view.protected)
        groups = groups_of(joins, merge)
        if prune == merge:
            return TokenMap.select(groups.anchor, tokens)
        share = similarity.clamp(min=LEAST_SHARE)
        return TokenMap.join(groups.group, groups.anchor, share=share, drops=prune < tokens)

    def _kept(self, view: View) -> tuple[int, int]:
        """Tokens to keep after pruning and after merging: ``merge <= prune <= tokens``."""
        numbers: dict[str, Any] | None = getattr(self, "_numbers", None)
        tokens, prefix, layer = view.features.shape[1], view.prefix, view.layer
        if numbers is None:
            r = to_remove(view, self.keep, None) if layer else 0  # the first layer never compresses
            kept = tokens - r // 2, tokens - r
        else:
            if len(numbers["prune"]) != view.layers:
                raise ThriftError(
                    f"{self.schedule or 'diffrate'} has numbers for {len(numbers['prune'])} layers, the model has "
                    f"{view.layers}: give one number a layer, or learn a schedule for this model"
                )
            learned_with = numbers.get("tokens") or view.tokens
            scale = (view.tokens - prefix) / max(learned_with - prefix, 1)
            kept = tuple(prefix + math.ceil((numbers[k][layer] - prefix) * scale) for k in ("prune", "merge"))
        prune = min(kept[0], tokens)
        return prune, min(kept[1], prune)


def _read(path: str) -> dict[str, Any]:
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "it holds no JSON"
        raise ThriftError(
            f"diffrate schedule={path!r} cannot be read ({why}): write the path of a file that learning the rates made"
        ) from error
    return _check(held, f"the file {path}")


def _check(held: Any, name: str) -> dict[str, Any]:
    """The numbers, if they are what they should be."""
    prune, merge, tokens = (held.get(k) if isinstance(held, dict) else None for k in ("prune", "merge", "tokens"))
    lists = [counts for counts in (prune, merge) if isinstance(counts, list) and counts and all(map(_is_count, counts))]
    if len(lists) < 2 or len(lists[0]) != len(lists[1]) or not (tokens is None or _is_count(tokens)):
        raise ThriftError(
            f"{name} must name the tokens kept in every layer, twice: "
            '"prune": [197, 160, ...], "merge": [197, 150, ...], and may say "tokens": 197'
        )
    return dict(held)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
