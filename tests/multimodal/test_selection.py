"""Methods on visual tokens: each against the authors' numbers, and the laws that all of them keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from multimodal.views import CONNECTOR, LAYERS, LAYOUTS, Segment, crops, mosaic, one_grid, rows_of, view
from tokenthrift import Plan, ThriftError
from tokenthrift.core.budget import Budget
from tokenthrift.core.method import find
from tokenthrift.core.view import View
from tokenthrift.multimodal import hired

GOLDEN = Path(__file__).parents[1] / "golden" / "multimodal"
ALL = pytest.mark.parametrize("name", CONNECTOR)
CLS = ["vtc_cls", "visionzip", "hired", "flashvlm"]


def golden(name):
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(GOLDEN / f"{name}.npz").items()}


def make(name, **params):
    return find(name).make(**params)


def kept(map):
    """Of each row the tokens that feed an output, ascending."""
    return [row.nonzero()[:, 0].tolist() for row in map.kept]


def plain_view(n, segments=(), **parts):
    """One image of ``n`` tokens, nothing protected."""
    mask = torch.ones(1, n, dtype=torch.bool)
    return View(mask=mask, protected=~mask, segments=segments, **parts)


# ---- the authors' numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [60, 64, 96])
def test_divprune_keeps_what_the_authors_code_keeps(n):
    cases = golden("visual_selection")
    features, keep = cases[f"divprune_x_{n}"][None], float(cases[f"divprune_ratio_{n}"])
    map = make("divprune", keep=keep).reduce(plain_view(n, features=features))
    assert kept(map)[0] == sorted(cases[f"divprune_idx_{n}"].tolist())


@pytest.mark.parametrize(("start", "keep"), [(2, 64), (-3, 20)])
def test_vtc_cls_keeps_what_the_authors_code_keeps(start, keep):
    cases = golden("more_selection")
    seen = plain_view(576, layers=6, cls=lambda layer: cases["vtc_cls_rows"][layer][None])
    map = make("vtc_cls", keep=keep, start=start).reduce(seen)
    assert kept(map)[0] == cases[f"vtc_cls_idx_{start}_{keep}"].tolist()


@pytest.mark.parametrize(("keep", "alpha"), [(64, 0.1), (192, 0.2)])
def test_hiprune_keeps_what_the_authors_code_keeps(keep, alpha):
    cases = golden("visual_selection")
    by_layer = {8: cases["hiprune_shallow_received"][None], 22: cases["hiprune_deep_received"][None]}
    seen = plain_view(576, (Segment(0, 1, 24, 24),), layers=24, received=by_layer.get)
    map = make("hiprune", keep=keep, alpha=alpha, official=True).reduce(seen)
    assert map.kept[0].equal(cases[f"hiprune_mask_{keep}_{alpha}"])


@pytest.mark.parametrize(("keep", "alpha"), [(0.2, 0.5), (0.4, 0.25)])
def test_hired_keeps_what_the_authors_code_keeps(keep, alpha):
    cases = golden("visual_selection")
    by_layer = {
        layer: cases[f"hired_{name}"][:, :, 0, 1:].transpose(0, 1).flatten(1)[None]
        for layer, name in ((0, "top"), (-2, "bottom"))
    }
    segments = [Segment(0, 1, 6, 6)]
    segments += [Segment(36 * (1 + i), 1, 6, 6, "crop", i // 2, i % 2) for i in (3, 0, 2, 1)]  # in any order
    seen = plain_view(180, tuple(segments), cls=by_layer.get)
    map = make("hired", keep=keep, alpha=alpha, official=True).reduce(seen)
    assert map.kept.view(5, 36).equal(cases[f"hired_mask_{keep}_{alpha}"])


@pytest.mark.parametrize(("dominant", "contextual"), [(10, 4), (20, 6)])
def test_visionzip_chooses_and_merges_what_the_authors_code_does(dominant, contextual):
    """Its merged tokens are sums of two, here they are means: half as long, unless nothing joined the target."""
    cases = golden("visual_selection")
    hidden, keys = cases["visionzip_hidden"][:, 1:], cases["visionzip_metric"][:, None, 1:]
    mask = torch.ones(2, 64, dtype=torch.bool)
    seen = View(mask=mask, protected=~mask, cls=lambda _: cases["visionzip_attn"][:, :, 0, 1:], keys=lambda _: keys)
    map = make("visionzip", keep=dominant + contextual, contextual=contextual).reduce(seen)
    out, joined = map.apply(hidden), map.sizes() > 1
    whole = torch.where(joined.unsqueeze(-1), 2.0, 1.0) * out
    for row in range(2):
        stays = map.owner[row, cases[f"visionzip_idx_{dominant}_{contextual}"][row, 1:].sort().values - 1]
        assert out[row, stays].equal(cases[f"visionzip_dominant_{dominant}_{contextual}"][row, 1:])
        merged = torch.ones(map.n_out, dtype=torch.bool).index_fill(0, stays, False)
        wanted = cases[f"visionzip_contextual_{dominant}_{contextual}"][row]
        torch.testing.assert_close(whole[row, merged], wanted, rtol=1e-5, atol=1e-5)
        assert joined[row, merged].any()


@pytest.mark.parametrize(("n", "keep"), [(64, 16), (100, 33), (576, 64)])
def test_flashvlm_keeps_what_the_authors_code_keeps(n, keep):
    cases = golden("more_selection")
    parts = {name: cases[f"flashvlm_{name}_{n}_{keep}"] for name in ("hidden", "cls", "text", "features", "idx")}
    seen = plain_view(n, features=parts["features"], cls=lambda _: parts["cls"], hidden=lambda _: parts["hidden"])
    seen.offer("text", parts["text"][None])
    seen.offer("text_mask", torch.ones(1, len(parts["text"]), dtype=torch.bool))
    assert kept(make("flashvlm", keep=keep).reduce(seen))[0] == parts["idx"].tolist()


@pytest.mark.parametrize("keep", [0.5, 0.25, 0.125])
def test_aim_merges_what_the_authors_code_merges(keep):
    cases = golden("more_selection")
    x = cases["aim_x"].flatten(0, 1)[None]
    segments = tuple(Segment(64 * i, 1, 8, 8, "frame") for i in range(3))
    map = make("aim", keep=keep).reduce(plain_view(192, segments, features=x))
    torch.testing.assert_close(map.apply(x)[0], cases[f"aim_{keep}"].flatten(0, 1), rtol=1e-5, atol=1e-5)


# ---- laws ----------------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keep", [1, 2, 3, 9, 17, 0.01, 0.055, 0.25, 0.5, 0.9])
def test_just_so_many_tokens_stay_and_separators_too(name, layout, keep):
    seen = view(LAYOUTS[layout], padding=5)
    map = make(name, keep=keep).reduce(seen)
    separators = (seen.protected & seen.mask).sum(1)
    free = (seen.mask & ~seen.protected).sum(1)
    assert map.lead == (2,) and map.n_in == seen.mask.shape[1]
    assert map.mask.sum(1).equal(Budget.of(keep).tokens_of(free) + separators)
    assert not (map.kept & ~seen.mask).any()
    # A token that must stay is an output on its own.
    stays = seen.protected & seen.mask
    assert (map.kept | ~stays).all()
    out = map.apply(seen.features)
    for row in range(2):
        for token in stays[row].nonzero()[:, 0].tolist():
            slot = map.owner[row, token]
            assert (map.owner[row] == slot).sum() == 1 and out[row, slot].equal(seen.features[row, token])


@ALL
@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeping_everything_is_the_identity_and_computes_nothing(name, layout):
    seen = view(LAYOUTS[layout], padding=4)
    ready = seen.computed()
    for keep in (1.0, 10_000, 0.9999):
        assert make(name, keep=keep).reduce(seen).is_identity
    assert seen.computed() == ready and not seen.asked


@ALL
def test_a_row_is_reduced_as_it_is_alone(name):
    seen = view(LAYOUTS["crops"], batch=3, padding=6)
    method = make(name, keep=0.3)
    together = method.reduce(seen)
    for row in range(3):
        alone = method.reduce(rows_of(seen, slice(row, row + 1)))
        assert alone.kept[0].equal(together.kept[row])
        torch.testing.assert_close(alone.dense()[0], together.dense()[row, : alone.n_out])


@ALL
def test_kept_tokens_are_in_their_order(name):
    map = make(name, keep=0.4).reduce(view(LAYOUTS["mosaic"], padding=3))
    for anchors, real in zip(map.anchors, map.mask, strict=True):
        assert (anchors[real].diff() > 0).all()


@ALL
def test_a_method_looks_at_what_it_says_and_at_no_other_layer(name):
    info, seen = find(name), view(LAYOUTS["crops"])
    method = make(name, keep=0.3)
    needed = View(**{part: getattr(seen, part) for part in info.needs})
    assert method.reduce(needed.require(info.needs)).kept.equal(method.reduce(seen).kept)
    layers = set(method.encoder_layers(LAYERS)) if hasattr(method, "encoder_layers") else set()
    assert seen.asked == layers
    for count in (1, 2, 3, 12, 24, 27, 32):
        if count > 1 or name not in CLS:
            found = make(name).encoder_layers(count) if layers and count > 1 else []
            assert all(0 <= layer < count for layer in found)


@ALL
def test_half_precision_chooses_the_same_kind_of_map(name):
    seen = view(LAYOUTS["crops"])
    seen.offer("features", seen.features.to(torch.bfloat16))
    seen.offer("text", seen.text.to(torch.bfloat16))
    for part in ("cls", "received", "keys", "hidden"):
        of_layer = getattr(seen, part)
        seen.offer(part, lambda layer, of_layer=of_layer: of_layer(layer).to(torch.bfloat16))
    map = make(name, keep=0.25).reduce(seen)
    assert map.mask.sum(1).tolist() == [30 + 4] * 2
    assert map.apply(seen.features).dtype == torch.bfloat16


@ALL
def test_equal_tokens_are_no_obstacle(name):
    seen = view(one_grid(5, 5))
    seen.offer("features", torch.ones_like(seen.features))
    for part in ("cls", "received", "keys", "hidden"):
        of_layer = getattr(seen, part)
        seen.offer(part, lambda layer, of_layer=of_layer: torch.ones_like(of_layer(layer)) / 25)
    assert make(name, keep=7).reduce(seen).mask.sum(1).tolist() == [7, 7]


# ---- one by one ----------------------------------------------------------------------------------------------------


def test_divprune_takes_one_of_each_kind_first():
    torch.manual_seed(0)
    kinds = torch.linalg.qr(torch.randn(8, 8)).Q[:5]
    features = (kinds.repeat_interleave(6, 0) + 0.01 * torch.randn(30, 8))[None]
    seen = plain_view(30, features=features)
    assert sorted(token // 6 for token in kept(make("divprune", keep=5).reduce(seen))[0]) == list(range(5))


def test_hiprune_keeps_the_neighbours_in_the_grid():
    """The best token is the last of a line: the first of the next line is none of its neighbours."""
    middle, deep = torch.zeros(1, 48), torch.linspace(1, 2, 48)[None]
    middle[0, 12 + 7] = 1  # line 1 of the second segment, at its right end
    segments = (Segment(0, 1, 3, 4), Segment(12, 1, 3, 4, "crop", 0, 0, torch.arange(12, 24)), Segment(24, 1, 4, 6))
    seen = plain_view(48, segments, layers=8, received={2: middle, 6: deep}.get)
    chosen = kept(make("hiprune", keep=6, alpha=0.8).reduce(seen))[0]
    assert chosen == [12 + 3, 12 + 6, 12 + 7, 12 + 11, 46, 47]
    chosen = kept(make("hiprune", keep=6, alpha=0.8, official=True).reduce(seen))[0]
    assert chosen == [12 + 3, 12 + 6, 12 + 7, 12 + 8, 12 + 11, 47]
    assert kept(make("hiprune", keep=3, alpha=1.0).reduce(seen))[0] == [45, 46, 47]  # no room for an anchor and its own


def test_hiprune_stays_within_a_frame():
    middle, deep = torch.zeros(1, 24), torch.linspace(1, 2, 24)[None]
    middle[0, 10] = 1  # middle of the last line of frame 0
    seen = plain_view(24, (Segment(0, 2, 4, 3),), layers=8, received={2: middle, 6: deep}.get)
    assert kept(make("hiprune", keep=5, alpha=1.0).reduce(seen))[0] == [7, 9, 10, 11, 23]


def test_hired_gives_the_budget_to_the_crop_on_whose_area_cls_looks():
    """CLS looks at the right half of the image: the crops at the left get nothing. In the authors' order of tokens, the
    right halves of lines are spread over all crops."""
    n, segments, _ = crops(4, 6, 2, 2)
    segments = tuple(Segment(24 * i, 1, 4, 6, s.kind, s.row, s.col) for i, s in enumerate(segments))
    early = torch.zeros(1, 1, 120)
    early[0, 0, :24] = (torch.arange(24) % 6 >= 3).float()
    late = torch.rand(1, 1, 120, generator=torch.Generator().manual_seed(0))
    seen = plain_view(120, segments, cls={0: early, -2: late}.get)
    per_part = make("hired", keep=40).reduce(seen).kept.view(5, 24).sum(1).tolist()
    assert per_part == [20, 0, 10, 0, 10]
    per_part = make("hired", keep=40, official=True).reduce(seen).kept.view(5, 24).sum(1).tolist()
    assert per_part == [20, 5, 5, 5, 5]
    assert n == 124


def test_hired_gives_the_whole_image_what_the_crops_cannot_hold():
    per_part = make("hired", keep=0.9, alpha=0.1).reduce(view(crops())).kept[0]
    assert [int(per_part[s.numbers()].sum()) for s in crops()[1]] == [12, 24, 24, 24, 24]


def test_visionzip_gives_target_and_others_equal_parts():
    """Of the six tokens that are left, two are targets: one token joins the first, three join the second."""
    keys = torch.tensor([[9, 9], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1], [0, 1.0]])[None, None]
    cls = torch.tensor([1, 0, 0, 0, 0, 0, 0.0])[None, None]
    seen = plain_view(7, cls=lambda _: cls, keys=lambda _: keys)
    map = make("visionzip", keep=3, contextual=2).reduce(seen)
    half, sixth = 1 / 2, 1 / 6
    wanted = [[1, 0, 0, 0, 0, 0, 0], [0, half, half, 0, 0, 0, 0], [0, 0, 0, sixth, half, sixth, sixth]]
    torch.testing.assert_close(map.dense()[0], torch.tensor(wanted))
    assert map.anchors[0].tolist() == [0, 1, 4]


def test_hired_knows_areas_of_unequal_crops():
    """A mosaic whose last line of crops was cut off below: that crop's area is the smaller part of the image."""
    whole = Segment(0, 1, 8, 4)
    parts = [Segment(32, 1, 4, 4, "crop", 0, 0), Segment(48, 1, 4, 4, "crop", 0, 1)]
    parts += [Segment(64, 1, 2, 4, "crop", 1, 0), Segment(72, 1, 2, 4, "crop", 1, 1)]
    area = hired._area_of(whole, parts).view(8, 4)
    assert area[:, 0].tolist() == [0] * 5 + [2] * 3  # 6 lines on 8: the first crop has 5.33 of them
    assert area[0].tolist() == [0, 0, 1, 1]


def test_flashvlm_follows_the_question():
    """With its weight on the text, the one token that resembles a word stays, wherever CLS looks."""
    seen = view(one_grid(6, 6), batch=1)
    features = seen.features.clone()
    features[0, 20] = 3 * seen.text[0, 3]
    seen.offer("features", features)
    for eta in (0.5, 1.0):
        assert 20 in kept(make("flashvlm", keep=4, eta=eta).reduce(seen))[0]
    blind = make("flashvlm", keep=4, eta=0.0, important=1.0).reduce(seen)
    assert kept(blind)[0] == sorted(seen.cls(-2).mean(1)[0].topk(4).indices.tolist())
    seen.offer("text_mask", torch.zeros_like(seen.text_mask))  # a prompt without text
    assert kept(make("flashvlm", keep=4, important=1.0).reduce(seen))[0] == kept(blind)[0]


def test_aim_merges_within_frames_and_all_mass_stays():
    seen = view(LAYOUTS["frames"])
    map = make("aim", keep=0.25).reduce(seen)
    assert map.sizes().sum(1).tolist() == [48, 48]
    joined = rows_of(seen, slice(None))
    joined.offer("segments", (Segment(0, 4, 3, 4, "frame"),))
    assert make("aim", keep=0.25).reduce(joined).dense().equal(map.dense())
    for sources in map.provenance():
        assert len({token // 12 for token, _ in sources[0]}) == 1
    assert (map.anchors // 12).tolist() == [[0] * 3 + [1] * 3 + [2] * 3 + [3] * 3] * 2


def test_aim_leaves_a_token_of_each_frame():
    segments = Segment(0, 1, 5, 6, "frame"), Segment(30, 1, 1, 2, "frame")
    seen = plain_view(32, segments, features=torch.randn(1, 32, 4, generator=torch.Generator().manual_seed(0)))
    assert make("aim", keep=2).reduce(seen).sizes().tolist() == [[30, 2]]
    assert make("aim", keep=1).reduce(seen).sizes().tolist() == [[32]]


# ---- what is refused -----------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("wrong", ["keep=0", "keep=0.0", "keep=-3", "keep=1.5", "keep=nan", "positions='ppe'"])
def test_impossible_parameters_are_refused_when_the_plan_is_read(name, wrong):
    with pytest.raises(ThriftError) as error:
        Plan.parse(f"connector={name}({wrong})") if "nan" not in wrong else make(name, keep=float("nan"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("hiprune", {"alpha": 1.1}),
        ("hiprune", {"alpha": float("nan")}),
        ("hired", {"alpha": -0.1}),
        ("flashvlm", {"eta": 2.0}),
        ("flashvlm", {"important": -1.0}),
        ("flashvlm", {"at_once": 0}),
        ("visionzip", {"contextual": 1.0}),
        ("visionzip", {"contextual": -1}),
        ("visionzip", {"keep": 8, "contextual": 8}),
        ("visionzip", {"contextual": float("nan")}),
    ],
)
def test_impossible_shares_are_refused(name, wrong):
    with pytest.raises(ThriftError) as error:
        make(name, **wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("vtc_cls", {"start": 8}),
        ("vtc_cls", {"start": 7}),
        ("vtc_cls", {"start": -1}),
        ("vtc_cls", {"start": -9}),
        ("visionzip", {"layer": 8}),
        ("hiprune", {"object_layer": 8}),
        ("hiprune", {"deep_layer": -9}),
        ("hired", {"early_layer": 12}),
        ("hired", {"late_layer": -9}),
        ("flashvlm", {"layer": 30}),
    ],
)
def test_layers_that_are_not_there_are_refused(name, wrong):
    with pytest.raises(ThriftError, match="layers") as error:
        make(name, **wrong).encoder_layers(8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", CLS)
def test_methods_that_need_cls_say_so_and_pass_on_the_views_error(name):
    assert "without CLS" in find(name).cls.__doc__

    def none(layer):
        raise ThriftError("this encoder has no CLS: use hiprune or divprune")

    seen = view()
    seen.offer("cls", none)
    with pytest.raises(ThriftError, match="hiprune or divprune"):
        make(name).reduce(seen)


def test_mosaics_are_as_their_crops_one_by_one():
    """HiRED over the lines of a mosaic keeps the same tokens of each crop as over the crops one behind the other."""
    n, segments, newlines = mosaic()
    seen = view((n, segments, newlines), batch=1)
    order = torch.cat([torch.arange(12), *(s.index.flatten() for s in segments[1:]), torch.tensor(newlines)])
    flat = (Segment(0, 1, 4, 3), *(Segment(12 + 12 * i, 1, 4, 3, "crop", i // 3, i % 3) for i in range(6)))
    other = View(mask=seen.mask, protected=seen.protected[:, order], segments=flat, layers=LAYERS)
    for part in ("cls", "received"):
        other.offer(part, lambda layer, part=part: getattr(seen, part)(layer)[..., order])
    for name in ("hired", "hiprune", "vtc_cls"):
        method = make(name, keep=0.35)
        assert method.reduce(other).kept.equal(method.reduce(seen).kept[:, order])
