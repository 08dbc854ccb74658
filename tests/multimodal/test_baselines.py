"""The baselines keep exactly what they say."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

import tokenthrift as tt
from tokenthrift.core.errors import ThriftError
from tokenthrift.core.view import Segment, View
from tokenthrift.ops.visual_grids import cells

NAMES = ["random_tokens", "uniform_tokens", "uniform_tokens(grid=True)", "center_tokens", "pool_tokens"]
MOSAIC = (
    Segment(0, 1, 3, 3),
    Segment(9, 1, 3, 2, "crop", 0, 0, torch.tensor([9, 10, 14, 15, 19, 20])),
    Segment(11, 1, 3, 2, "crop", 0, 1, torch.tensor([11, 12, 16, 17, 21, 22])),
)


def make(name, **params):
    call, _, rest = name.partition("(")
    given = "".join(f"{k}={v!r}, " for k, v in params.items()) + rest.rstrip(")")
    return tt.Plan.parse(f"connector={call}({given})").at("connector")[0]


WHOLE = (Segment(0, 1, 6, 8),)


def seen(segments=WHOLE, n=48, protected=(), rows=2):
    mark = torch.zeros(rows, n, dtype=torch.bool)
    mark[:, list(protected)] = True
    features = torch.randn(rows, n, 5, generator=torch.Generator().manual_seed(0))
    return View(features=features, mask=torch.ones_like(mark), protected=mark, segments=segments)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [0.5, 0.11, 1e-9, 1, 5, 7, 13, 29, 47, 1000, 1.0])
def test_counts_are_exact(name, keep):
    map = make(name, keep=keep).reduce(seen())
    wanted = min(keep, 48) if isinstance(keep, int) else max(int(48 * keep + 0.5), 1)
    assert map.mask.sum(1).tolist() == [wanted] * 2
    assert map.is_identity == (wanted == 48)
    assert torch.allclose(map.dense().sum(-1), torch.ones(2, map.n_out))


@pytest.mark.parametrize("name", NAMES)
def test_newlines_stay(name):
    map = make(name, keep=0.25).reduce(seen(MOSAIC, 24, (13, 18, 23)))
    assert map.kept[:, [13, 18, 23]].all()
    assert map.mask.sum(1).tolist() == [round(21 / 4) + 3] * 2
    anchors = map.anchors[0][map.mask[0]]
    assert sorted(anchors.tolist()) == sorted(set(anchors.tolist()))


@pytest.mark.parametrize("name", NAMES[2:])
def test_frames_share_evenly(name):
    map = make(name, keep=12).reduce(seen((Segment(0, 4, 3, 4, "frame"),)))
    frames = map.anchors[0] // 12
    assert frames.bincount(minlength=4).tolist() == [3] * 4


def test_pooling_is_average_pooling_where_the_grid_divides():
    view = seen()
    map = make("pool_tokens", keep=12).reduce(view)
    expected = adaptive_avg_pool2d(view.features.view(2, 6, 8, 5).movedim(-1, 1), (3, 4)).flatten(2).transpose(1, 2)
    assert torch.allclose(map.apply(view.features), expected, atol=1e-6)


def test_cells_divide_a_grid():
    for h, w, count in [(24, 24, 64), (24, 24, 63), (3, 7, 5), (1, 9, 4), (9, 1, 4), (2, 2, 4)]:
        group, middle = cells(h, w, count)
        assert group.unique().tolist() == list(range(count))
        assert group[middle].tolist() == list(range(count))


def test_center_and_uniform_pick_by_place():
    assert make("center_tokens", keep=4).reduce(seen()).source[0].tolist() == [19, 20, 27, 28]
    assert make("uniform_tokens", keep=4).reduce(seen()).source[0].tolist() == [6, 18, 30, 42]
    assert make("uniform_tokens", keep=4, grid=True).reduce(seen()).source[0].tolist() == [9, 13, 33, 37]


def test_random_is_seeded():
    first, again, other = (make("random_tokens", keep=8, seed=s).reduce(seen()).source for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[0], first[1])


@pytest.mark.parametrize("name", ["random_tokens", "uniform_tokens", "center_tokens", "pool_tokens"])
def test_mistakes(name):
    with pytest.raises(ThriftError, match="outside"):
        make(name, keep=0.0)
    with pytest.raises(ThriftError, match="keeps nothing"):
        make(name, keep=0)
    with pytest.raises(ThriftError, match="did you mean 'gapless'"):
        make(name, positions="gaples")
