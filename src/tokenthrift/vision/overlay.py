"""Pictures of what a vision method did to an image: which patches were merged, and which were dropped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import ThriftError
from ..core.tokenmap import TokenMap

if TYPE_CHECKING:
    from PIL.Image import Image

PATCH = 12
"""Pixels a side that a patch has at least, so that borders leave room for colours: small images are enlarged."""
LINE = 0.65
"""Opacity of the white borders."""
DROPPED = 0.25
"""Brightness of dropped patches."""


def draw_groups(image: Image, map: TokenMap, grid: Sequence[int], prefix: int = 1, row: int = 0) -> Image:
    """The image with each merged group in its mean colour inside a border, and dropped patches darkened.

        with tokenthrift.apply("vision=tome(keep=0.25)", model) as session:
            model(pixel_values)
        draw_groups(image, session.provenance()["vision"], grid=(37, 37)).save("groups.png")

    Patches that stand alone keep their pixels and get no border.

    Args:
        image: what the encoder saw, at any size; it is spread over the whole grid.
        map: from the ``prefix + h * w`` tokens of the encoder to those left, e.g. of ``session.provenance()``.
        grid: patches ``(h, w)``, or ``(1, h, w)``.
        prefix: number of tokens in front of the patches (CLS, registers).
        row: which image of the batch.

    Raises:
        ThriftError: the grid does not have as many patches as the map has tokens, or there is no such row; an image or
            a map that is none.
    """
    from PIL import Image as images

    if isinstance(map, dict):
        raise ThriftError("this method has a map a layer: pass the one of a layer, provenance()['vision'][0]")
    if not isinstance(image, images.Image):
        raise ThriftError(f"draw_groups draws on a Pillow image, not on {type(image).__name__}: see PIL.Image.open")
    rows = math.prod(map.lead)
    if not 0 <= row < rows:
        raise ThriftError(f"there is no row {row}: the map is of {rows} images, counted from 0")
    if not (isinstance(grid, Sequence) and len(grid) in (2, 3) and all(isinstance(s, int) and s > 0 for s in grid)):
        raise ThriftError(f"grid={grid!r} is none: write the patches as (height, width)")
    h, w = grid[-2:]
    if map.n_in != prefix + h * w:
        raise ThriftError(f"the map is of {map.n_in} tokens, but prefix and grid make {prefix} + {h} x {w}")
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    zoom = max(1, -(-PATCH * h // pixels.shape[0]), -(-PATCH * w // pixels.shape[1]))
    pixels = pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)
    height, width = pixels.shape[:2]

    group = map.owner.reshape(-1, map.n_in)[row, prefix:].reshape(h, w).cpu().numpy()
    merged = np.bincount(group[group >= 0], minlength=map.n_out) > 1
    group = group[np.arange(height) * h // height][:, np.arange(width) * w // width]  # of every pixel
    kept = group >= 0
    flat = kept & merged[group]

    count = np.maximum(np.bincount(group[kept], minlength=map.n_out), 1)
    mean = np.stack([np.bincount(group[kept], pixels[kept, c], map.n_out) / count for c in range(3)], axis=-1)
    out = np.where(flat[..., None], mean[group], pixels)
    out[~kept] *= DROPPED
    border = _borders(group, flat)
    out[border] += LINE * (255 - out[border])
    return images.fromarray(out.round().astype(np.uint8))


def _borders(group: Any, flat: Any) -> Any:
    """Pixels at which a new group begins, from the left or from above, if either of the two is merged."""
    border = np.zeros(group.shape, dtype=bool)
    border[:, 1:] |= (group[:, 1:] != group[:, :-1]) & (flat[:, 1:] | flat[:, :-1])
    border[1:] |= (group[1:] != group[:-1]) & (flat[1:] | flat[:-1])
    return border
