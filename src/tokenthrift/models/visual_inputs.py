"""Images and placeholders that a vision-language model is given, checked: it would say nothing, or not what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.errors import ThriftError

MODALITIES = ("image", "video")


def check_pixels(given: Mapping[str, Any]) -> None:
    """Refuse pixels that the encoder would take, and read wrongly.

    Args:
        given: what a model's ``get_image_features`` or ``get_video_features`` is called with.

    Raises:
        ThriftError: pixels that are no floats, not as many images as sizes, or patches as in the grids.
    """
    pixels, sizes = pixels_in(given), given.get("image_sizes")
    if pixels is None:
        return
    if not pixels.is_floating_point():
        raise ThriftError(
            f"the pixels are {pixels.dtype}: give normalised floats, as the model's own processor makes them"
        )
    if sizes is not None and pixels.dim() == 5 and len(sizes) != len(pixels):
        raise ThriftError(
            f"there are {len(pixels)} images in pixel_values but {len(sizes)} in image_sizes: give one size for each"
        )
    grid = next((v for k, v in given.items() if k.endswith("grid_thw") and v is not None), None)
    if grid is not None and pixels.dim() == 2 and int(grid.prod(-1).sum()) != len(pixels):
        raise ThriftError(
            f"there are {len(pixels)} patches, and {int(grid.prod(-1).sum())} in the grids (..._grid_thw): give both "
            "as the model's own processor makes them"
        )


def why_refused(config: Any, given: Mapping[str, Any]) -> str | None:
    """Of pixels at which the encoder failed, what is wrong with them; None where nothing is known to be.

    Args:
        config: of the model.
        given: as above.
    """
    pixels, vision = pixels_in(given), config.vision_config
    if pixels is None or pixels.dim() < 4:
        return None
    channels, height, width = pixels.shape[-3:]
    wanted = getattr(vision, "num_channels", 3)
    if channels != wanted:
        return f"images of {channels} channels for an encoder of {wanted}"
    size = vision.image_size
    high, wide = size if isinstance(size, list | tuple) else (size, size)
    if (height, width) != (high, wide):
        return f"images of {height} x {width} pixels for an encoder of {high} x {wide}"
    return None


def pixels_in(given: Mapping[str, Any]) -> Tensor | None:
    """The pixels among arguments."""
    found = (v for k, v in given.items() if k.startswith("pixel_values") and isinstance(v, Tensor))
    return next(found, None)


def check_placeholders(config: Any, ids: Tensor | None, modality: str, features: Any) -> None:
    """Refuse a prompt that has more or fewer placeholders than its images have tokens.

    Args:
        config: of the model.
        ids: ``(batch, n)``, or None where embeddings were given.
        modality: one of :data:`MODALITIES`.
        features: the tokens of each image.

    Raises:
        ThriftError: says how many there are of both.
    """
    token = getattr(config, f"{modality}_token_id", None)
    if ids is None or token is None:
        return
    found, wanted = int((ids == token).sum()), sum(len(one) for one in features)
    if found != wanted:
        raise ThriftError(
            f"the prompt has {found} {modality} placeholders, and the {modality}s given are {wanted} tokens: let the "
            "model's own processor write the placeholders, one for each token"
        )


def check_images_given(config: Any, given: Mapping[str, Any]) -> None:
    """Refuse a prompt with placeholders but no images: they would be read as words.

    Args:
        config: of the model.
        given: what the ``forward`` is called with that joins images and text.

    Raises:
        ThriftError: says so.
    """
    ids, cache = given.get("input_ids"), given.get("past_key_values")
    if ids is None or ids.shape[1] < 2 or pixels_in(given) is not None or given.get("mm_encoder_outputs"):
        return
    if cache is not None and int(cache.get_seq_length()) > 0:  # drafts, say, repeat what the prompt had
        return
    for modality in MODALITIES:
        found = int((ids == getattr(config, f"{modality}_token_id", -1)).sum())
        if found:
            raise ThriftError(
                f"the prompt has {found} {modality} placeholders but no {modality} was given: pass the pixel values "
                "that the model's processor makes, or leave the placeholders out"
            )
