"""PiToMe: merge tokens that have many like them, and protect those that stand alone."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import elu, normalize

from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.clustering import ranked
from ..ops.matching import Groups, bipartite_soft_matching, fewest_free, most_similar
from ..ops.schedules import Removal, check_removal, check_share, to_remove

PAPER = "Accelerating Transformers with Spectrum-Preserving Token Merging"
NEEDS = ("features", "keys", "sizes", "protected", "prefix", "grid")


@method("pitome", stage="vision", paper=PAPER, arxiv="2405.16148", needs=NEEDS)
class PiToMe:
    """Merge tokens of high energy, those in large clusters, between attention and MLP; training-free.

    The energy of a token is the mean of ``ELU(cosine - margin)`` of its key with all keys (averaged over the heads). To
    remove ``r`` tokens, the ``2r`` of highest energy are ranked by it; those at even ranks each join the most similar
    one at an odd rank. All others are protected, and so are CLS and registers, which have no part in the energy.

    The defaults are those of the authors' code for DeiT. Their paper has ``margin=0.9``, which the code has for BLIP
    and CLIP, ``bsm=0`` and ``f(x) = x`` above the margin where the code has ``x - margin``; the code is followed. It
    puts tokens in the order of their energy, here they keep theirs: the next layer's energies do not depend on it.

    Parameters:
        keep: share of the patch tokens that is left after the last layer, in (0, 1]; the layers share the work evenly.
        r: instead of ``keep``, tokens to remove, as for ``tome``: ``8``, ``(8, -1.0)``, ``[16, 8]`` or a file.
        ratio: instead of both, the share of its tokens that each layer keeps, as in the paper: 0.9, say. No layer
            removes more than half of its unprotected tokens.
        margin: similarity above which tokens count as alike, in the first layer; falls linearly, to 0 behind the last.
        bsm: share of the layers, from the first, that protect nothing: all tokens are ranked by energy, and of those at
            even ranks the ``r`` most similar to one at an odd rank join it. The code rounds up half of the layers.
        prop_attn: proportional attention. Off in the authors' code, which counts sizes without adding them to the
            scores.

    Raises:
        ThriftError: a share outside its range, more than one of ``keep``, ``r`` and ``ratio``, a bad ``margin``.
    """

    per_layer: ClassVar[str] = "r"

    keep: float = 0.5
    r: Removal | None = None
    ratio: float | None = None
    margin: float = 0.75
    bsm: float = 0.5
    prop_attn: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", _check("pitome", self.keep, self.r, self.ratio, type(self).keep))
        if not -1 <= self.margin <= 1:
            raise ThriftError(f"pitome margin={self.margin!r} is no cosine: write a number in [-1, 1], the paper's 0.9")
        if not 0 <= self.bsm <= 1:
            raise ThriftError(f"pitome bsm={self.bsm!r} is no share of the layers: write 0.5, or 0.0 for none of them")

    def reduce(self, view: View) -> TokenMap | None:
        """The merge of this layer; None where no token is to go."""
        r = _to_remove(view, self.keep, self.r, self.ratio)
        if r <= 0:
            return None
        metric = normalize(view.keys.mean(1).to(torch.float32), dim=-1)
        margin = self.margin - self.margin * view.layer / view.layers
        scores = energy(metric, margin, view.protected)
        merge = most_similar_ranks if view.layer < math.ceil(view.layers * self.bsm) else alternate_ranks
        return merge(metric, scores, r).map(view.sizes)


@method("pitome_text", stage="vision", paper=PAPER, arxiv="2405.16148", needs=NEEDS)
class PiToMeText:
    """Merge tokens of high energy in the first layers of a text encoder (BERT and its kind); training-free.

    As ``pitome``, with the energy of a Gaussian kernel: the mean of ``exp(-((1 - cosine) / σ)² / 2) / (σ √2π)``, where
    ``σ = 1 - margin``. Of the ``2r`` tokens of highest energy, each of the upper half joins the most similar one of the
    lower half. The first token ([CLS]) and the last ([SEP]) are protected; the authors' code protects the first, and
    forgets sizes between layers: there a token that was merged twice is a mean of means.

    Parameters:
        keep: share of the tokens after the first that is left in the end, in (0, 1].
        r: instead of ``keep``, tokens to remove, as for ``tome``; a list may name any layer.
        ratio: instead of both, the share of its tokens that each of the first ``layers`` layers keeps. No layer removes
            more than half of its unprotected tokens.
        layers: how many layers, from the first, remove tokens; None = all. The authors' code has 3.
        margin: of the first layer, below 1.
        fall: how much lower the margin would be behind the last layer; it falls linearly.
        prop_attn: proportional attention. Off in the authors' code.

    Raises:
        ThriftError: a share outside its range, more than one of ``keep``, ``r`` and ``ratio``, a bad ``margin``.
    """

    per_layer: ClassVar[str] = "r"

    keep: float = 0.5
    r: Removal | None = None
    ratio: float | None = None
    layers: int | None = 3
    margin: float = 0.9
    fall: float = 0.25
    prop_attn: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", _check("pitome_text", self.keep, self.r, self.ratio, type(self).keep))
        if self.layers is not None and self.layers < 1:
            raise ThriftError(f"pitome_text layers={self.layers} removes nothing: write layers=3, or None for all")
        if not (-1 <= self.margin < 1 and 0 <= self.fall <= 2):
            given = f"margin={self.margin!r}, fall={self.fall!r}"
            raise ThriftError(f"pitome_text {given}: write a margin in [-1, 1) and a fall in [0, 2]")

    def reduce(self, view: View) -> TokenMap | None:
        """The merge of this layer; None where no token is to go."""
        named = isinstance(self.r, list | str)  # layer by layer
        r = _to_remove(view, self.keep, self.r, self.ratio, None if named else self.layers)
        if r <= 0:
            return None
        metric = normalize(view.keys.mean(1).to(torch.float32), dim=-1)
        margin = self.margin - self.fall * view.layer / view.layers
        scores = gaussian_energy(metric, margin, view.protected)
        return upper_into_lower(metric, scores, r).map(view.sizes)


def energy(metric: Tensor, margin: float, protected: Tensor) -> Tensor:
    """Mean over the unprotected tokens of ``ELU(cosine - margin)``, a token's own among them.

    Args:
        metric: ``(batch, tokens, dim)``, normalised.
        margin: below which tokens are unlike.
        protected: ``(batch, tokens)`` bool.

    Returns:
        ``(batch, tokens)``, ``-inf`` for protected tokens.
    """
    return _mean_over_free(elu((metric @ metric.transpose(-1, -2)).sub_(margin), inplace=True), protected)


def gaussian_energy(metric: Tensor, margin: float, protected: Tensor) -> Tensor:
    """The same with a normal density of ``1 - cosine``, whose deviation is ``1 - margin``."""
    sigma = 1 - margin
    distance = (1 - metric @ metric.transpose(-1, -2)) / sigma
    return _mean_over_free(torch.exp(-0.5 * distance.square()) / (sigma * math.sqrt(2 * math.pi)), protected)


def alternate_ranks(metric: Tensor, scores: Tensor, r: int) -> Groups:
    """Of the ``2r`` tokens of highest energy, those at even ranks join the most similar ones at odd ranks."""
    top = ranked(scores)[:, : 2 * r]
    giver, taker = top[:, ::2], top[:, 1::2]
    return Groups.of_pairs(giver, most_similar(metric, giver, taker), metric.shape[1])


def most_similar_ranks(metric: Tensor, scores: Tensor, r: int) -> Groups:
    """Of all tokens, the ``r`` at even ranks that have the most similar one at an odd rank join it."""
    rank = ranked(scores)
    row = torch.arange(metric.shape[0], device=metric.device).unsqueeze(-1)
    matched = bipartite_soft_matching(metric[row, rank], r, scores[row, rank] == -torch.inf)
    assert matched is not None  # r is at most half of the unprotected tokens, which have the first ranks
    joins = rank.gather(1, matched.anchor.gather(1, matched.group))
    giver, receiver = (t[joins != rank].view(-1, r) for t in (rank, joins))
    return Groups.of_pairs(giver, receiver, metric.shape[1])


def upper_into_lower(metric: Tensor, scores: Tensor, r: int) -> Groups:
    """The ``r`` tokens of highest energy join the most similar ones of the next ``r``."""
    top = ranked(scores)
    giver, taker = top[:, :r], top[:, r : 2 * r]
    return Groups.of_pairs(giver, most_similar(metric, giver, taker), metric.shape[1])


def _mean_over_free(affinity: Tensor, protected: Tensor) -> Tensor:
    free = (~protected).to(affinity.dtype)
    total = (affinity @ free.unsqueeze(-1)).squeeze(-1)
    return (total / free.sum(-1, keepdim=True)).masked_fill(protected, -torch.inf)


def _to_remove(view: View, keep: float, r: Removal | None, ratio: float | None, layers: int | None = None) -> int:
    """At most half of the unprotected tokens; of those the ``ratio`` is to be kept, if it is given."""
    acts = layers is None or view.layer < layers
    wanted = to_remove(view, keep, r, layers) if ratio is None else int(acts and ratio < 1)
    if not wanted:
        return 0  # before anything is computed
    free = fewest_free(view.protected)
    return min(wanted if ratio is None else math.floor(free - free * ratio), free // 2)


def _check(name: str, keep: float, r: Removal | None, ratio: float | None, default: float) -> Removal | None:
    if ratio is not None:
        check_share(name, "ratio", ratio, "half of a layer's tokens")
        if r is not None or keep != default:
            raise ThriftError(f"{name} takes one of keep=..., r=... and ratio=..., not several")
    return check_removal(name, keep, r, default)
