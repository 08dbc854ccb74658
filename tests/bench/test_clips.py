"""Clips cut out of one photo."""

import numpy as np
import pytest
from PIL import Image

from tokenthrift import ThriftError
from tokenthrift.bench.clips import clip
from tokenthrift.models.images import preprocess


def ramp(width=90, height=60):
    """Red tells the column, green the row."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([2 * x, 2 * y, 0 * x], axis=-1).astype(np.uint8))


def seen(frame):
    """The columns and rows of the photo that a frame shows."""
    pixels = np.asarray(frame, dtype=float) / 2
    return pixels[..., 0].min(), pixels[..., 0].max(), pixels[..., 1].min(), pixels[..., 1].max()


def test_the_camera_pans_and_zooms():
    frames = clip(ramp(), 5, 24, zoom=2.0, pan=(1.0, 0.0), view=0.5)
    assert [f.size for f in frames] == [(24, 24)] * 5
    boxes = [seen(f) for f in frames]
    widths = [right - left for left, right, _, _ in boxes]
    centres = [(left + right) / 2 for left, right, _, _ in boxes]
    assert widths == sorted(widths, reverse=True) and widths[0] == pytest.approx(2 * widths[-1], abs=2)
    assert np.diff(centres) == pytest.approx(15, abs=1)  # (90 - 30) / 4 columns a step
    assert all((top + bottom) / 2 == pytest.approx(29.5, abs=1) for _, _, top, bottom in boxes)


def test_it_never_leaves_the_photo_and_is_always_the_same():
    a, b = (clip(ramp(), 4, 16, zoom=0.2, pan=(-1.0, 1.0), view=0.9) for _ in range(2))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert seen(a[-1])[3] - seen(a[-1])[2] > 55  # moved back until the photo's whole height shows


def test_frames_make_a_batch():
    assert preprocess(clip(ramp(), 3, 28), 28).shape == (3, 3, 28, 28)
    assert len(clip(ramp(), 1, 8)) == 1


@pytest.mark.parametrize("wrong", [{"frames": 0}, {"size": 0}, {"view": 0}, {"view": 2}, {"zoom": 0}, {"pan": (2, 0)}])
def test_impossible_cameras_are_refused(wrong):
    with pytest.raises(ThriftError):
        clip(ramp(), **wrong)
