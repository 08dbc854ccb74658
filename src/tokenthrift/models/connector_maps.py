"""Images in a prompt, and the map of the whole prompt that follows from those of its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ThriftError
from ..core.tokenmap import TokenMap
from .connector_positions import Run
from .encoder_parts import EncoderParts
from .pictures import Picture


@dataclass(eq=False)
class Pictures:
    """The images of one call of the model's ``get_image_features``, and what the encoder did with them."""

    found: list[Picture]
    shape: tuple[int, int] | None = None
    """Rows of the encoder, and patches in each."""
    parts: EncoderParts | None = None
    decided: dict[int, tuple[TokenMap, int]] = field(default_factory=dict)
    """By image: the map of its layout's images, and which row of it."""


@dataclass(frozen=True, eq=False)
class Placed:
    """An image in a prompt.

    Attributes:
        picture: how its tokens lie.
        row: of the batch.
        columns: ``(n,)`` int64, where its tokens stand in the prompt, as the user wrote it.
        span: ``(placeholders,)`` int64, all of its placeholders: more than tokens where the encoder was reduced.
        number: of the image among those of its kind.
    """

    picture: Picture
    row: int
    columns: Tensor
    span: Tensor
    number: int
    source: Pictures

    def patches(self) -> TokenMap:
        """From the encoder's patches ``(1, rows · patches)``, all those of its call, to the image's tokens; tokens
        that come from no patch are padding.

        Raises:
            ThriftError: the encoder was reduced (its own map is ``provenance()["vision"]``), or is not known.
        """
        if self.picture.pool is None or self.source.shape is None:
            raise ThriftError("which patches stand behind these tokens is not known: see provenance()['vision']")
        rows, patches = self.source.shape
        each = torch.eye(rows * patches).view(rows, patches, -1)
        return TokenMap.transform(self.picture.pool(each)[None])


def prompt_map(placed: Sequence[Placed], maps: Sequence[tuple[TokenMap, int]], real: Tensor) -> TokenMap:
    """The map of a whole prompt, ``(batch,)`` over its columns, from those of its images.

    Text stays, padding goes; rows that keep fewer tokens have their padding in front. Where several outputs of an
    image have one anchor, the later ones stand at the next columns.
    """
    batch, n = real.shape
    device = real.device
    text = real & ~columns_of(placed, real)
    rows: list[list[tuple[Tensor, Tensor, Tensor, Tensor]]] = [[] for _ in range(batch)]
    for p, (map, i) in zip(placed, maps, strict=True):
        outputs = map.mask[i].nonzero().squeeze(-1)
        anchors, order = map.anchors[i, outputs].sort(stable=True)
        column = p.columns[distinct(anchors, map.n_in)]
        slot = torch.full((map.n_out,), -1, device=device)
        slot[outputs[order]] = column  # an output is known by its column from here on
        target = map.target[i]
        edge = (target >= 0).nonzero().squeeze(-1)
        weight = map.weight[i, edge]
        rows[p.row].append((p.columns[map.source[i, edge]], slot[target[edge]], weight, column))
    edges = []
    for row, parts in enumerate(rows):
        own = text[row].nonzero().squeeze(-1)
        source, at, weight, column = (
            torch.cat(ts) for ts in zip(*parts, (own, own, torch.ones(len(own), device=device), own), strict=True)
        )
        column = column.sort().values
        edges.append((source, torch.searchsorted(column, at), weight, column))
    width, most = max(len(e[3]) for e in edges), max(len(e[0]) for e in edges)
    plain = all(bool((e[2] == 1).all()) and len(e[0]) == len(e[3]) for e in edges)
    index = torch.full((batch, width), -1, device=device)
    for row, (*_, column) in enumerate(edges):
        index[row, width - len(column) :] = column
    if plain and all(bool((e[0].sort().values == e[3]).all()) for e in edges):
        return TokenMap.select(index, n)
    source = torch.zeros(batch, most, dtype=torch.int64, device=device)
    target, weights = torch.full_like(source, -1), torch.zeros(batch, most, device=device)
    for row, (of, to, weight, column) in enumerate(edges):
        source[row, : len(of)], weights[row, : len(of)] = of, weight
        target[row, : len(of)] = to + width - len(column)
    return TokenMap(source, target, weights, n_in=n, n_out=width, anchor=index.clamp(min=0))


def distinct(anchors: Tensor, n: int) -> Tensor:
    """Ascending numbers below ``n``, none of them twice, as near to the given ones as that allows."""
    steps = torch.arange(len(anchors), device=anchors.device)
    pushed = (anchors - steps).cummax(0).values + steps
    return torch.minimum(pushed, n - len(anchors) + steps)


def columns_of(placed: Sequence[Placed], like: Tensor) -> Tensor:
    """``(batch, n)`` bool: the columns of images."""
    out = torch.zeros_like(like)
    for p in placed:
        out[p.row, p.span] = True
    return out


def text_of(embeds: Tensor, text: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The text tokens of rows, aligned to the left: ``(rows, T, dim)`` and ``(rows, T)``."""
    map = TokenMap.keep(text[rows])
    return map.apply(embeds[rows]), map.mask


def runs_of(placed: Sequence[Placed]) -> list[Run]:
    """The runs of columns of images, in ascending order."""
    out = []
    for p in placed:
        columns = p.span
        breaks = (columns.diff() != 1).nonzero().squeeze(-1) + 1
        for part in columns.tensor_split(breaks.cpu()):
            out.append(Run(p.row, int(part[0]), int(part[-1]) + 1))
    return sorted(out, key=lambda run: (run.row, run.start))


def reduced_features(map: TokenMap, visual: Tensor, features: Tensor) -> Tensor:
    """Features of the visual tokens, ``(visual tokens, dim)``, as the prompt's map makes them: ``(batch, m, dim)``."""
    whole = features.new_zeros(*visual.shape, features.shape[-1])
    whole[visual] = features
    return map.apply(whole)


def restored(out: Any, columns: Tensor, n: int) -> Any:
    """Hidden states at all columns: a dropped one shows that of the last column before it that was kept."""
    slots = torch.arange(columns.shape[1], device=columns.device).expand(columns.shape)
    back = torch.full((len(columns), n + 1), -1, device=columns.device)
    back.scatter_(1, torch.where(columns >= 0, columns, n), slots)
    back = back[:, :n].cummax(1).values

    def restore(hidden: Tensor) -> Tensor:
        index = back.clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, index).masked_fill((back < 0).unsqueeze(-1), 0)

    out.last_hidden_state = restore(out.last_hidden_state)
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = tuple(restore(h) for h in out.hidden_states)
    return out


def check_map(name: str, map: TokenMap, images: int, n: int) -> None:
    if map.lead != (images,) or map.n_in != n:
        raise ThriftError(f"{name} gave a map over {(*map.lead, map.n_in)} for {images} images of {n} tokens")
    if not bool(map.mask.any(-1).all()):
        raise ThriftError(f"{name} leaves nothing of an image: raise its budget to at least one token")
