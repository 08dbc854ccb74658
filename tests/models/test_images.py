"""Pictures of every kind become the same pixel values; what is no picture is said in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tokenthrift.core.errors import ThriftError
from tokenthrift.models.images import IMAGENET_MEAN, IMAGENET_STD, ImageProcessor, open_image, preprocess

MEAN, STD = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))


def photo(height: int = 60, width: int = 90) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_normalisation() -> None:
    image = photo(224, 224)
    pixels = preprocess(image)
    assert pixels.shape == (1, 3, 224, 224) and pixels.dtype == torch.float32
    assert torch.allclose(pixels * STD + MEAN, torch.from_numpy(image / 255).permute(2, 0, 1).float(), atol=1e-6)


@pytest.mark.parametrize(
    ("fit", "size", "shape"),
    [("stretch", 224, (224, 224)), ("stretch", 230, (224, 224)), ("aspect", 224, (154, 224)), ("pad", 518, (518, 518))],
)
def test_sides_are_whole_patches(fit: Any, size: int, shape: tuple[int, int]) -> None:
    assert preprocess(photo(), size, fit=fit).shape[2:] == shape


def test_extreme_proportions_keep_a_patch() -> None:
    assert preprocess(photo(1, 5000), fit="aspect").shape[2:] == (14, 224)


def test_padding_is_black_and_centred() -> None:
    pixels = preprocess(np.full((50, 100, 3), 255, np.uint8), 28, fit="pad") * STD + MEAN
    assert pixels[0, 0, :, 5].round().tolist() == [0] * 7 + [1] * 14 + [0] * 7


def test_every_kind_of_input_gives_the_same(tmp_path: Path) -> None:
    image = photo()
    Image.fromarray(image).save(tmp_path / "photo.png")
    kinds: list[Any] = [
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        Image.fromarray(image),
        image,
        image / 255.0,
        torch.from_numpy(image),
        image.astype(np.int64),
        np.dstack([image, np.full(image.shape[:2], 255, np.uint8)]),
    ]
    batch = preprocess(kinds)
    assert batch.shape[0] == len(kinds)
    assert torch.equal(batch, batch[:1].expand_as(batch))
    assert torch.equal(preprocess(np.stack([image, image])), batch[:2])
    assert torch.equal(ImageProcessor()(image)["pixel_values"], batch[:1])
    assert ImageProcessor(size=28)(image, size=56)["pixel_values"].shape[2:] == (56, 56)


def test_greyscale_transparency_and_depth() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for kind in (grey, grey[:, :, None], Image.fromarray(grey), (grey.astype(np.uint16) * 257)):
        source = Image.fromarray(kind) if getattr(kind, "dtype", None) == np.uint16 else kind
        assert np.array_equal(np.asarray(open_image(source))[:, :, 0], grey)
    assert np.asarray(open_image(grey > 9)).max() == 255
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(clear).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(Image.new("CMYK", (4, 4))).mode == "RGB"
    assert open_image(Image.new("P", (4, 4))).mode == "RGB"


def test_a_turned_photo_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (20, 40)


def test_bad_images(tmp_path: Path) -> None:
    Image.fromarray(photo(400, 400)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    (tmp_path / "text.png").write_text("no picture")
    bad: list[tuple[Any, str]] = [
        (tmp_path / "cut.png", "cut.png is not an image"),
        (tmp_path / "text.png", "text.png is not an image"),
        (tmp_path / "none.png", "there is no image"),
        (tmp_path, "is a folder"),
        ([], "no image"),
        (None, "an image array is"),
        (object(), "an image array is"),
        (photo().transpose(2, 0, 1), r"got \(3, 60, 90\)"),
        (np.zeros((0, 5, 3), np.uint8), "an image array is"),
        (photo() * 1.0, "values from 0 to 1"),
        (np.full((5, 5), np.nan), "values from 0 to 1"),
        (photo().astype(int) - 9, "values from 0 to 255"),
        (["a", ["b"]], "."),
    ]
    for image, said in bad:
        with pytest.raises(ThriftError, match=said) as caught:
            preprocess(image)
        assert "\n" not in str(caught.value)


def test_bad_settings() -> None:
    for settings, said in (
        ({"fit": "strech"}, "did you mean 'stretch'"),
        ({"size": 3}, "at least one patch"),
        ({"size": 0, "patch": 0}, "at least one patch"),
    ):
        with pytest.raises(ThriftError, match=said):
            preprocess(photo(), **settings)  # type: ignore[arg-type]
    with pytest.raises(ThriftError, match="cannot share a batch"):
        preprocess([photo(60, 90), photo(90, 60)], fit="aspect")
    with pytest.raises(ThriftError, match="return_tensors"):
        ImageProcessor()(photo(), return_tensors="np")
