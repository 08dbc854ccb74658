"""How the visual tokens of each family of models lie: the layout of an image, and the patches behind each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..core.view import Segment


@dataclass(frozen=True, eq=False)
class Picture:
    """One image or video, as the language model gets it.

    Attributes:
        n: visual tokens.
        segments: how they lie; empty where that is not known.
        pool: from the encoder's patches ``(rows, patches, channels)`` of all images to the tokens of this one, ``(n,
            channels)``: as the connector does it, but with the mean where that joins patches. None where a token has
            no patches that are known.
        protected: ``(n,)`` bool, tokens that separate rows of patches; None = none.
        left: where the encoder itself was reduced: ``(n,)`` int64, ascending, which of the image's ``placeholders``
            the tokens that are left stand at; None = at all of them.
    """

    n: int
    segments: tuple[Segment, ...] = ()
    pool: Callable[[Tensor], Tensor] | None = None
    protected: Tensor | None = None
    left: Tensor | None = None
    whole: int | None = None

    @property
    def placeholders(self) -> int:
        """How many of them the image has in a prompt."""
        return self.n if self.whole is None else self.whole

    @property
    def layout(self) -> tuple[Any, ...]:
        """Equal for pictures that lie alike."""
        return self.n, self.whole, *((s.start, s.t, s.h, s.w, s.kind, s.row, s.col) for s in self.segments)


@dataclass(frozen=True)
class Seen:
    """What a call of the model's ``get_image_features`` or ``get_video_features`` was given, and gave.

    Attributes:
        inner: the model with the vision encoder and the language model.
        given: arguments by name.
        lengths: tokens of each image.
        packed: arguments of the model's own ``pack_image_features``, if it was called.
    """

    inner: Any
    given: dict[str, Any]
    lengths: Sequence[int]
    packed: dict[str, Any] | None
    video: bool

    def shape(self, images: int) -> tuple[int, int]:
        """Rows of the encoder and patches in each, given how many images there are; patches of all images may be one
        row."""
        if self.packed is not None:
            return sum(len(f) for f in self.packed["image_features"]), self.packed["image_features"][0].shape[1]
        if self.pixels.dim() == 2:
            return 1, len(self.pixels)
        h, w = self.grid(self.pixels)
        return images * (self.pixels.shape[1] if self.video and self.pixels.dim() == 5 else 1), h * w

    @property
    def pixels(self) -> Tensor:
        """The first argument."""
        value: Tensor = next(v for k, v in self.given.items() if k.startswith("pixel_values"))
        return value

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.inner.config.vision_config.patch_size
        high, wide = side if isinstance(side, (list, tuple)) else (side, side)
        return pixels.shape[-2] // high, pixels.shape[-1] // wide


def read_rows(seen: Seen) -> list[Picture]:
    """A token a patch, a row of the encoder an image (LLaVA-1.5); some of the encoder's own tokens may come first."""
    (h, w), pictures = seen.grid(seen.pixels), []
    for row, n in enumerate(seen.lengths):
        first = n - h * w
        segments = (Segment(first, 1, h, w),) if first >= 0 else ()
        pool = partial(_pool_row, row, 1, first) if first >= 0 else None
        pictures.append(Picture(n, segments, pool))
    return pictures


def read_blocks(seen: Seen) -> list[Picture]:
    """A token a block of patches, a row of the encoder an image (InternVL, Gemma 3) or, where the features of several
    come as one, so many after another (SmolVLM, Idefics3)."""
    h, w = seen.grid(seen.pixels)
    side = _block_side(seen.inner.config, h * w)
    n = h * w // side**2
    count = sum(seen.lengths) // n
    segment = Segment(0, 1, h // side, w // side)
    return [Picture(n, (segment,), partial(_pool_row, row, side, 0)) for row in range(count)]


def _block_side(config: Any, patches: int) -> int:
    if hasattr(config, "scale_factor"):  # SmolVLM, Idefics3
        return int(config.scale_factor)
    if hasattr(config, "downsample_ratio"):  # InternVL
        return round(1 / config.downsample_ratio)
    return round((patches / config.mm_tokens_per_image) ** 0.5)  # Gemma 3


def _pool_row(row: int, side: int, first: int, patches: Tensor) -> Tensor:
    x = patches[row]
    if side > 1:
        high = _height(x.shape[0])
        x = avg_pool2d(x.view(high, -1, x.shape[-1]).movedim(-1, 0)[None].float(), side)[0]
        return x.flatten(1).transpose(0, 1).to(patches.dtype)
    return torch.cat([x.new_zeros(first, x.shape[-1]), x]) if first else x


def _height(patches: int) -> int:
    """These connectors take squares only."""
    return round(patches**0.5)


def read_merged(seen: Seen) -> list[Picture]:
    """Patches of all images in one sequence, ordered so that the patches of a token follow each other (Qwen-VL)."""
    name = "video_grid_thw" if "video_grid_thw" in seen.given else "image_grid_thw"
    side, start, pictures = int(seen.inner.config.vision_config.spatial_merge_size), 0, []
    for t, h, w in seen.given[name].tolist():
        segment = Segment(0, t, h // side, w // side, "frame" if seen.video else "image")
        pool = partial(_pool_span, start, start + t * h * w, side**2)
        pictures.append(Picture(segment.size, (segment,), pool))
        start += t * h * w
    return pictures


def _pool_span(start: int, end: int, unit: int, patches: Tensor) -> Tensor:
    return patches[0, start:end].view(-1, unit, patches.shape[-1]).float().mean(1).to(patches.dtype)


def read_packed(seen: Seen) -> list[Picture]:
    """A thumbnail and a mosaic of crops whose rows end in a newline token (LLaVA-NeXT, LLaVA-OneVision)."""
    if seen.packed is None:
        return _read_frames(seen)
    packed, features = seen.packed, seen.packed["image_features"]
    start, pictures = 0, []
    for i, (of_image, n) in enumerate(zip(features, seen.lengths, strict=True)):
        pool = partial(_pack, seen.inner, packed, i, start, len(of_image))
        start += len(of_image)
        pictures.append(_mosaic(seen, i, of_image, n, pool))
    return pictures


def _pack(
    inner: Any, packed: dict[str, Any], image: int, start: int, count: int, patches: Tensor, newline: float = 0.0
) -> Tensor:
    """The model's own packing, of anything that its patches have."""
    sizes = packed["image_sizes"][image : image + 1]
    given = {**packed, "image_features": [patches[start : start + count]], "image_sizes": sizes}
    given["image_newline"] = patches.new_full(patches.shape[-1:], newline)
    out: Tensor = inner.pack_image_features(**given)[0][0]
    return out


def _mosaic(seen: Seen, i: int, of_image: Tensor, n: int, pool: Callable[[Tensor], Tensor]) -> Picture:
    count, patches = of_image.shape[:2]
    side = _height(patches)
    marks = torch.zeros(count, patches, 1, device=of_image.device)
    pack = partial(_pack, seen.inner, seen.packed or {}, i, 0, count, newline=1.0)
    newline = pack(marks)[:, 0] == 1
    whole = Segment(0, 1, side, side)
    if count == 1:
        return Picture(n, (whole,), pool, newline)
    # Where in the mosaic each token comes from, in patches: also where the model has resized it.
    place = torch.arange(patches, device=of_image.device)
    inside = torch.stack([place // side, place % side], dim=-1).float()
    config = seen.inner.config
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    size = (seen.packed or {})["image_sizes"][i]
    rows, cols = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    corner = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"), -1).view(-1, 1, 2)
    at = torch.cat([inside[None], inside[None] + corner.to(inside) * side])
    source = pack(at)[patches:]
    kept = (~newline[patches:]).nonzero().squeeze(-1)
    wide = int(newline[patches:].nonzero()[0])  # tokens before the first newline
    source = source[kept].view(-1, wide, 2)
    across, down = (source[0, :, 1] / side + 1e-4).int(), (source[:, 0, 0] / side + 1e-4).int()
    number = kept.view(-1, wide) + patches
    segments = [whole]
    for row in range(rows):
        for col in range(cols):
            index = number[down == row][:, across == col]
            if index.numel():
                high, width = index.shape
                first = int(index[0, 0])
                segments.append(Segment(first, 1, high, width, "crop", row, col, index.flatten()))
    return Picture(n, tuple(segments), pool, newline)


def _read_frames(seen: Seen) -> list[Picture]:
    """Videos of LLaVA-OneVision: the frames at half the resolution, then one newline token."""
    frames, pictures = seen.pixels.shape[1], []
    side = _height((seen.lengths[0] - 1) // frames)
    for i, n in enumerate(seen.lengths):
        newline = torch.zeros(n, dtype=torch.bool)
        newline[-1] = True
        pool = partial(_pool_frames, seen.inner, i * frames, frames)
        pictures.append(Picture(n, (Segment(0, frames, side, side, "frame"),), pool, newline))
    return pictures


def _pool_frames(inner: Any, start: int, frames: int, patches: Tensor) -> Tensor:
    x: Tensor = inner.apply_pooling(patches[start : start + frames].contiguous())
    return torch.cat([x.flatten(0, 1), x.new_zeros(1, x.shape[-1])])
