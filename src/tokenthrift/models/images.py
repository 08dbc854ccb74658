"""Images → pixel values for vision transformers, with Pillow and numpy only (torchvision is several GB of CUDA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from tokenthrift.core.errors import ThriftError, did_you_mean

if TYPE_CHECKING:
    import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_ORIENTATION = 0x0112
"""The EXIF tag that says how a photo is turned."""

Fit = Literal["stretch", "aspect", "pad"]


def preprocess(
    images: Any,
    size: int = 224,
    *,
    patch: int = 14,
    fit: Fit = "stretch",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> torch.Tensor:
    """One image or several → float32 pixel values (B, 3, H, W), normalised; H and W are multiples of `patch` pixels.

    An image is a path, a Pillow image, or an array or tensor (H, W), (H, W, 3) or (H, W, 4), integers 0…255 or floats
    0…1. Greyscale is repeated, transparency is laid over white, a photo's EXIF rotation is applied. `size` is the
    longer side in pixels, rounded to a multiple of `patch`. `fit`:
    "stretch" makes it a square: every image gives the same grid, nothing is cut off, no token is padding;
    "aspect" keeps the proportions (images of one call must then agree in shape);
    "pad" keeps them and fills up to a square with black: what the dinov2-s pack's saliency head was trained with.
    Padding tokens are trivial to remove, so numbers about token reduction should not use "pad".
    Raises ThriftError for anything that is not a readable image.
    """
    import torch

    if fit not in get_args(Fit):
        raise ThriftError(f"unknown fit '{fit}': {did_you_mean(str(fit), get_args(Fit))}")
    if patch < 1 or size < patch:
        raise ThriftError(f"size must be at least one patch ({patch} pixels), got {size}")
    pixels = [_pixels(open_image(image), size, patch, fit) for image in _as_list(images)]
    if not pixels:
        raise ThriftError("no image was given")
    shapes = {tuple(item.shape) for item in pixels}
    if len(shapes) > 1:
        raise ThriftError(f"images of different shapes cannot share a batch with fit='{fit}': use fit='stretch'")
    batch = torch.stack(pixels)
    return (batch - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


@dataclass(frozen=True)
class ImageProcessor:
    """`preprocess` with its settings kept, called like a transformers processor."""

    size: int = 224
    patch: int = 14
    fit: Fit = "stretch"

    def __call__(self, images: Any, return_tensors: str = "pt", **settings: Any) -> dict[str, torch.Tensor]:
        """{"pixel_values": (B, 3, H, W) float32}; `settings` override size, patch, fit, mean or std for this call."""
        if return_tensors != "pt":
            raise ThriftError(f"return_tensors must be 'pt', got '{return_tensors}'")
        return {
            "pixel_values": preprocess(images, **{"size": self.size, "patch": self.patch, "fit": self.fit} | settings)
        }


def open_image(image: Any) -> Any:
    """A path, Pillow image, array or tensor as an upright RGB Pillow image. Raises ThriftError if it is none."""
    Image, ImageOps = _pillow()
    if isinstance(image, str | Path):
        image = _open_file(Path(image), Image)
    elif not isinstance(image, Image.Image):
        image = _from_array(image, Image)
    try:
        if image.getexif().get(_ORIENTATION, 1) != 1:  # where nothing turns, a large image need not be copied
            image = ImageOps.exif_transpose(image)
        return _rgb(image, Image)
    except (OSError, ValueError, SyntaxError) as error:
        raise ThriftError(f"the image cannot be decoded ({error}): it is truncated or damaged") from error


def _open_file(path: Path, Image: Any) -> Any:
    try:
        with Image.open(path) as opened:
            opened.load()
            return opened
    except FileNotFoundError as error:
        raise ThriftError(f"there is no image {path}") from error
    except IsADirectoryError as error:
        raise ThriftError(f"{path} is a folder, not an image") from error
    except Image.DecompressionBombError as error:
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise ThriftError(f"{path} has more pixels than Pillow opens ({most:,}): make the image smaller") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ThriftError(f"{path} is not an image Pillow can read: damaged, or an unknown format") from error


def _from_array(array: Any, Image: Any) -> Any:
    import numpy as np

    try:
        data = np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)
    except (TypeError, ValueError) as error:
        raise ThriftError(f"not an image: {type(array).__name__}") from error
    if data.ndim == 3 and data.shape[2] == 1:
        data = data[:, :, 0]
    if data.dtype.kind not in "buif" or data.size == 0 or not (data.ndim == 2 or data.shape[2:] in ((3,), (4,))):
        raise ThriftError(f"an image array is (H, W), (H, W, 3) or (H, W, 4), got {data.shape} of {data.dtype}")
    if data.dtype.kind == "f":
        if not (np.isfinite(data).all() and data.min() >= 0 and data.max() <= 1):
            raise ThriftError("a float image holds values from 0 to 1 (divide by 255, or pass uint8)")
        data = data * 255
        np.rint(data, out=data)
    elif data.dtype.kind == "b":
        data = data * 255
    elif data.min() < 0 or data.max() > 255:
        raise ThriftError(f"an integer image holds values from 0 to 255, got {data.min()} to {data.max()}")
    return Image.fromarray(data.astype(np.uint8))


def _rgb(image: Any, Image: Any) -> Any:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA") if image.mode != "RGBA" else image
        # The colour under a transparent pixel is arbitrary, so it must not show through.
        under = Image.new("RGB", image.size, "white")
        under.paste(image, mask=image.getchannel("A"))
        return under
    if image.mode.startswith("I"):  # 16-bit greyscale: convert("RGB") would clip nearly everything to white
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


def _pixels(image: Any, size: int, patch: int, fit: Fit) -> torch.Tensor:
    """Resize; (3, H, W) float32 in 0…1."""
    import numpy as np
    import torch

    Image, _ = _pillow()
    square = _multiple(size, patch)
    if fit == "stretch":
        image = image.resize((square, square), Image.Resampling.BICUBIC)
    else:
        scale = square / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        if fit == "aspect":
            image = image.resize((_multiple(width, patch), _multiple(height, patch)), Image.Resampling.BICUBIC)
        else:
            how = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
            canvas = Image.new("RGB", (square, square), "black")
            canvas.paste(image.resize((width, height), how), ((square - width) // 2, (square - height) // 2))
            image = canvas
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)


def _multiple(side: int, patch: int) -> int:
    return max(1, round(side / patch)) * patch


def _as_list(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return list(images)
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ThriftError("reading images needs Pillow: pip install 'tokenthrift[packs]'") from error
    return Image, ImageOps
