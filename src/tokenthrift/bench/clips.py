"""Short clips made of one photo, for methods that use what consecutive frames have in common."""

from __future__ import annotations

from typing import Any

from ..core.errors import ThriftError
from ..models.images import open_image


def clip(
    image: Any,
    frames: int = 8,
    size: int = 224,
    *,
    zoom: float = 1.5,
    pan: tuple[float, float] = (1.0, 0.5),
    view: float = 0.6,
) -> list[Any]:
    """A camera that moves over a photo: ``frames`` square Pillow images of ``size`` pixels, always the same ones.

    The first frame shows a square that is the share ``view`` of the photo's shorter side, the last one ``1 / zoom`` of
    that (nearer; ``zoom < 1`` moves back, as far as the photo reaches), each step zooming by the same factor.
    Meanwhile the centre moves evenly by ``pan`` (to the right, downwards), in shares of the room that the first square
    has, across the photo's middle; -1...1. The frames are real: cut out between pixels and resampled, so that a patch
    of one frame is found in the next, moved by a fraction of a patch. As a batch:

        pixels = preprocess(clip("photo.jpg", frames=8), 224)          # (8, 3, 224, 224)

    Args:
        image: what ``open_image`` takes: a path, a Pillow image, an array or a tensor.

    Raises:
        ThriftError: fewer than one frame or pixel, or a camera that cannot be: see above.
    """
    if frames < 1 or size < 1:
        raise ThriftError(f"a clip needs at least one frame of one pixel, got frames={frames}, size={size}")
    if not 0 < view <= 1 or zoom <= 0 or max(map(abs, pan)) > 1:
        raise ThriftError(f"write 0 < view <= 1, zoom > 0 and pan within -1...1, got {view=}, {zoom=}, {pan=}")
    from PIL import Image

    photo = open_image(image)
    width, height = photo.size
    shorter = min(width, height)
    room = [length - view * shorter for length in (width, height)]
    made = []
    for frame in range(frames):
        t = frame / (frames - 1) if frames > 1 else 0.0
        side = min(view * shorter * zoom**-t, shorter)
        box: list[float] = []
        for length, by, free in zip((width, height), pan, room, strict=True):
            corner = length / 2 + by * free * (t - 0.5) - side / 2
            box.append(min(max(corner, 0.0), length - side))
        corners = (*box, box[0] + side, box[1] + side)
        made.append(photo.resize((size, size), Image.Resampling.BICUBIC, box=corners))
    return made
