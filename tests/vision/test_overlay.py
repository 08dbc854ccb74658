"""The overlay: colours, borders and darkness are where the map says."""

import numpy as np
import pytest
import torch

from tokenthrift import ThriftError, TokenMap
from tokenthrift.vision.overlay import DROPPED, draw_groups

images = pytest.importorskip("PIL.Image")


def picture(h=40, w=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def draw(group, grid, pixels, prefix=1, **more):
    map = TokenMap.merge(torch.tensor(group)[None])
    return np.asarray(draw_groups(images.fromarray(pixels), map, grid, prefix, **more)).astype(float)


def test_groups_have_their_mean_colour_others_their_pixels():
    pixels = picture()
    out = draw([0, 1, 1, 2, 3, 1, -1], (2, 3), pixels)  # CLS; patches of 20 x 20 pixels
    shared = np.concatenate([pixels[:20, :40].reshape(-1, 3), pixels[20:, 20:40].reshape(-1, 3)]).mean(0)
    assert np.abs(out[:20, :40] - shared).max() <= 0.5
    assert np.abs(out[21:, 21:40] - shared).max() <= 0.5
    assert (out[:20, 41:] == pixels[:20, 41:]).all()  # alone: as it was, but for the border
    assert (out[21:, :20] == pixels[21:, :20]).all()
    assert np.abs(out[21:, 41:] - DROPPED * pixels[21:, 41:]).max() <= 0.5


def test_borders_are_where_a_merged_group_ends():
    out = draw([0, 1, 1, 2, 3, 4, 5], (2, 3), np.zeros((40, 60, 3), dtype=np.uint8))
    assert (out[:20, 40] > 150).all() and (out[20, :40] > 150).all()
    assert out[1:19, 1:40].max() == 0  # none inside the group
    assert out[21:].max() == 0  # none between patches that stand alone


def test_nothing_merged_draws_the_image():
    pixels = picture()
    assert (draw(list(range(6)), (1, 2, 3), pixels, prefix=0) == pixels).all()


def test_small_images_are_enlarged_and_odd_sizes_work():
    assert draw([0, 0, 1, 1], (2, 2), picture(7, 9), prefix=0).shape == (28, 36, 3)
    assert draw([0, 0, 1, 1], (2, 2), picture(101, 67), prefix=0).shape == (101, 67, 3)


def test_rows_of_a_batch_and_grey_images():
    map = TokenMap.merge(torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0]]))
    grey = images.fromarray(picture()[..., 0])
    alone, one = (np.asarray(draw_groups(grey, map, (2, 2), prefix=0, row=row)) for row in (0, 1))
    assert (alone == np.asarray(grey.convert("RGB"))).all()
    assert one.std() == 0


def test_a_grid_that_does_not_fit_is_refused():
    with pytest.raises(ThriftError, match=r"6 tokens, but prefix and grid make 1 [+] 2 x 3"):
        draw([0, 1, 2, 3, 4, 5], (2, 3), picture())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"map": {0: TokenMap.identity(4)}}, r"a map a layer: pass the one of a layer"),
        ({"image": "photo.png"}, "draws on a Pillow image, not on str"),
        ({"grid": (4,)}, r"write the patches as \(height, width\)"),
        ({"grid": None}, r"write the patches as \(height, width\)"),
        ({"grid": (-2, -2)}, r"write the patches as \(height, width\)"),
        ({"row": 1}, "no row 1: the map is of 1 images"),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong, said):
    given = {"image": images.fromarray(picture()), "map": TokenMap.identity(4), "grid": (2, 2), "prefix": 0}
    with pytest.raises(ThriftError, match=said):
        draw_groups(**{**given, **wrong})
