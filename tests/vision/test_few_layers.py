"""Methods that reduce tokens in a few layers: what they share, and each against the authors' numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tokenthrift import Plan, ThriftError, TokenMap
from tokenthrift.core.method import find
from tokenthrift.ops.clustering import anchor_shares, ranked, sinkhorn_shares
from tokenthrift.ops.importance import importance
from tokenthrift.ops.stages import stages_of
from tokenthrift.vision.centerclip import CenterCLIP
from tokenthrift.vision.dpc_knn import DPCKNN
from tokenthrift.vision.evit import EViT
from tokenthrift.vision.kmedoids import KMedoids
from tokenthrift.vision.sinkhorn import Sinkhorn
from tokenthrift.vision.token_transforming import TokenTransforming
from tokenthrift.vision.tps import TPS
from vision.views import idle_view, view

GOLDEN = Path(__file__).parents[1] / "golden" / "vision"
close = {"rtol": 1e-5, "atol": 1e-5}
NAMES = ["evit", "tps", "kmedoids", "dpc_knn", "sinkhorn", "token_transforming"]
SUMS_TO_ONE = [*NAMES, "centerclip"]


def golden(name):
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(GOLDEN / f"{name}.npz").items()}


def make(name, **params):
    return find(name).make(**params)


def random_view(batch=2, tokens=17, prefix=1, seed=0, **more):
    torch.manual_seed(seed)
    return view(torch.randn(batch, tokens, 8), prefix, **more)


def combined(method, seen):
    map = method.reduce(seen)
    return map.apply(seen.features) if not hasattr(method, "combine") else method.combine(seen, map)


# ---- where, and how many -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "layers"), [(12, (3, 6, 9)), (24, (6, 12, 18)), (16, (4, 8, 12)), (3, (0, 1, 2)), (2, (0, 1)), (1, (0,))]
)
def test_layers_are_at_the_quarters_of_the_depth(depth, layers):
    assert stages_of(depth, "evit", None) == layers


@pytest.mark.parametrize("name", NAMES)
def test_other_layers_and_keeping_all_compute_nothing(name):
    for layer in (0, 1, 2, 4, 11):
        assert make(name).reduce(idle_view(layer=layer)) is None
    for params in ({"keep": 1.0}, {"r": 0}, {"r": [0, 0, 0, 0, 5]}):
        assert make(name, **params).reduce(idle_view(layer=3)) is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_numbers_that_are_kept(name, prefix):
    tokens = [50]
    for layer in range(12):
        seen = random_view(tokens=tokens[-1] + prefix, prefix=prefix, layer=layer, layers=12, start=50 + prefix)
        map = make(name, keep=0.125).reduce(seen)
        if map is not None:
            tokens.append(map.n_out - prefix)
    assert tokens == [50, 26, 14, 8] if name == "evit" else [50, 25, 13, 7]


@pytest.mark.parametrize("name", NAMES)
def test_r_is_what_the_output_lacks(name):
    for layer, r in enumerate([5, 0, 3]):
        map = make(name, r=[5, 0, 3]).reduce(random_view(layer=layer, layers=3))
        assert (17 if map is None else map.n_out) == 17 - r
    assert make(name, r=99).reduce(random_view()).n_out == (3 if name == "evit" else 2)  # something is always left


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"keep": 0}, r"not a share in \(0, 1\]"),
        ({"keep": 1.5}, r"not a share in \(0, 1\]"),
        ({"layers": (6, 3)}, r"write layers=\(3, 6, 9\)"),
        ({"layers": (3, 3)}, r"write layers="),
        ({"layers": ()}, r"write layers="),
        ({"layers": 3}, r"write layers="),
        ({"layers": (-1,)}, r"write layers="),
        ({"layers": (True,)}, r"write layers="),
        ({"layers": "369"}, r"write layers="),
        ({"r": -1}, "write r=8"),
        ({"r": 8, "keep": 0.3}, "not both"),
        ({"r": 8, "layers": (3,)}, "not both"),
    ],
)
def test_bad_parameters_are_refused(name, params, message):
    with pytest.raises(ThriftError, match=message) as error:
        make(name, **params)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("evit(order=score)", "order='official'"),
        ("tps(temperature=0.0)", "1.0 is the paper's"),
        ("kmedoids(weights=some)", "'attention' or 'equal'"),
        ("kmedoids(iterations=-1)", "3 is the paper's"),
        ("kmedoids(iterations=1000000000)", "at most 1000"),
        ("dpc_knn(neighbours=0)", "at least 1"),
        ("sinkhorn(eps=0.0)", "eps above 0"),
        ("sinkhorn(iterations=0)", "at least 1 and at most 1000"),
        ("sinkhorn(iterations=10001)", "at most 1000"),
        ("token_transforming(temperature=-1.0)", "must be above 0"),
        ("token_transforming(anchors=random)", "'attention' or 'uniform'"),
        ("centerclip(at=-1)", "count from 0"),
        ("centerclip(frames=0)", "1 frame or more"),
        ("centerclip(centers=0)", "keeps nothing"),
        ("centerclip(distance=l1)", "distance='cosine'"),
    ],
)
def test_each_ones_bad_parameters_are_refused(call, message):
    with pytest.raises(ThriftError, match=message) as error:
        Plan.parse(f"vision={call}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_fewer_layers_is_told_so(name):
    with pytest.raises(ThriftError, match=r"the model has 3 layers; name some of 0 to 2"):
        make(name, layers=(1, 3)).reduce(idle_view(layer=0, layers=3))


@pytest.mark.parametrize("call", ["evit()", "tps(layers=[3, 6])", "kmedoids(r=[4, 2])", "sinkhorn(r=(8, -1.0))"])
def test_plans_print_back_the_same(call):
    plan = Plan.parse(f"vision={call}")
    assert Plan.parse(str(plan)) == plan == Plan.from_yaml(plan.to_yaml())


# ---- what every map keeps to ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUMS_TO_ONE)
@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("held", [(), (16,)])
def test_laws_of_maps(name, prefix, held):
    params = {"at": 0, "centers": 7, "mean": True} if name == "centerclip" else {"keep": 0.5}
    sizes = torch.rand(2, 17) + 0.5
    seen = random_view(prefix=prefix, held=held, sizes=sizes)
    method = make(name, **params)
    map = method.reduce(seen)
    w = map.dense()
    torch.testing.assert_close(w.sum(-1), torch.ones(2, map.n_out))
    if name != "kmedoids":  # which drops tokens
        torch.testing.assert_close(map.sizes(sizes).sum(-1), sizes.sum(-1))
    eye = torch.eye(map.n_out).expand(2, -1, -1)
    if map.exclusive:
        torch.testing.assert_close(w @ map.unmerge(eye), eye, **close)
    assert map.exclusive == (name not in ("sinkhorn", "token_transforming"))
    # protected tokens stay alone and as they are, those of the prefix in front; the others in their order
    out = combined(method, seen)
    protected = seen.protected[0]
    assert torch.equal(out[:, :prefix], seen.features[:, :prefix])
    owner = map.owner[:, protected]
    torch.testing.assert_close(map.sizes(sizes).gather(1, owner), sizes[:, protected])
    torch.testing.assert_close(out.gather(1, owner[..., None].expand(-1, -1, 8)), seen.features[:, protected], **close)
    anchors = map.anchors[:, :-1] if name == "evit" else map.anchors
    assert (anchors.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("name", SUMS_TO_ONE)
def test_rows_are_reduced_as_if_alone(name):
    method = make(name, **({"at": 0, "centers": 7} if name == "centerclip" else {"keep": 0.4}))
    torch.manual_seed(3)
    x, attention, keys = torch.randn(3, 21, 8), torch.randn(3, 2, 21, 21).softmax(-1), torch.randn(3, 2, 21, 4)
    together = combined(method, view(x, attention=attention, keys=keys))
    for i in range(3):
        alone = combined(method, view(x[i : i + 1], attention=attention[i : i + 1], keys=keys[i : i + 1]))
        torch.testing.assert_close(alone[0], together[i], **close)


@pytest.mark.parametrize("name", SUMS_TO_ONE)
def test_half_precision_and_equal_tokens(name):
    method = make(name, **({"at": 0, "centers": 7, "mean": True} if name == "centerclip" else {"keep": 0.4}))
    for x in (torch.randn(2, 21, 8).to(torch.bfloat16), torch.ones(2, 21, 8), torch.zeros(2, 21, 8)):
        keys = x.unsqueeze(1)[..., :4]
        uniform = torch.full((2, 2, 21, 21), 1 / 21, dtype=x.dtype)
        out = combined(method, view(x, keys=keys, attention=uniform))
        assert out.isfinite().all() and out.dtype == x.dtype


# ---- each one ------------------------------------------------------------------------------------------------------


def test_evit_is_the_official_one():
    g = golden("tokenreduction_zoo")
    seen = view(g["evit_x"], attention=g["evit_attn"])
    method = EViT(layers=(0,), keep=float(g["evit_keep_rate"]), order="official")
    map = method.reduce(seen)
    assert torch.equal(map.anchors[:, 1:-1] - 1, g["evit_idx"])
    torch.testing.assert_close(method.combine(seen, map), g["evit_out"], **close)

    ordered = EViT(keep=0.7, layers=(0,))
    out = ordered.combine(seen, ordered.reduce(seen))
    index = g["evit_idx"].sort(dim=-1).values + 1
    assert torch.equal(out[:, 1:-1], g["evit_x"].gather(1, index[..., None].expand(-1, -1, 8)))
    torch.testing.assert_close(out[:, -1], g["evit_out"][:, -1], **close)


def test_evit_without_fusing_selects():
    seen = random_view()
    method = EViT(keep=0.7, layers=(0,), fuse=False)
    map = method.reduce(seen)
    assert map.is_selection and map.n_out == 1 + 12
    kept = ranked(importance(seen)[:, 1:])[:, :12].sort(dim=-1).values + 1
    assert torch.equal(map.anchors[:, 1:], kept)
    assert torch.equal(method.combine(seen, map), map.apply(seen.features))


def test_evit_fuses_two_or_none():
    assert EViT(r=0).reduce(random_view()) is None
    assert EViT(r=1).reduce(random_view()).n_out == 16
    assert EViT(keep=0.9).reduce(random_view(tokens=5, layers=1)) is None  # 4 patches, all kept
    assert EViT(keep=0.75).reduce(random_view(tokens=5, layers=1)) is None  # one alone would be fused


@pytest.mark.parametrize(("key", "temperature"), [("out", 1.0), ("out_t05", 0.5)])
def test_tps_squeezes_as_the_official_one(key, temperature):
    g = golden("tps_eval")
    x = torch.cat([torch.zeros(2, 1, 8), g["kept"], g["pruned"]], dim=1)
    falling = torch.arange(15, 0, -1.0).expand(2, 1, 15, 15) / 120  # CLS attends to the kept ones most
    map = TPS(r=5, temperature=temperature).reduce(view(x, attention=falling))
    torch.testing.assert_close(map.apply(x)[:, 1:], g[key], **close)


def test_tps_extremes():
    assert TPS(r=5, temperature=1e-3).reduce(random_view()).weight.isfinite().all()
    last = random_view(tokens=4, held=(3,))
    map = TPS(r=9).reduce(last)  # all that is left is protected, and receives nothing
    assert torch.equal(map.apply(last.features), last.features[:, [0, 3]]) and (map.sizes() == 1).all()


def test_kmedoids_are_the_official_ones():
    g = golden("tokenreduction_zoo")
    weight = g["kmed_weight"].squeeze(-1)
    attention = torch.nn.functional.pad(weight, (1, 0))[:, None, None] / 17 * torch.ones(17, 1)  # all rows alike
    x = torch.cat([torch.zeros(2, 1, 8), g["x"]], dim=1)
    map = KMedoids(r=11).reduce(view(x, attention=attention))
    assert torch.equal(map.anchors[:, 1:] - 1, g["kmed_idx"].sort(dim=-1).values)
    assert map.is_selection


def test_kmedoids_with_equal_weights_ask_for_no_attention():
    seen = random_view()
    seen.offer("attention", None)
    assert KMedoids(keep=0.5, weights="equal").reduce(seen).n_out == 9


def test_dpc_knn_averages_the_official_clusters():
    g = golden("tokenreduction_zoo")
    x = torch.cat([torch.zeros(2, 1, 8), g["x"]], dim=1)
    map = DPCKNN(r=11, neighbours=int(g["dpc_k"])).reduce(view(x))
    order = g["dpc_centers"].argsort(dim=-1)
    mean = TokenMap.merge(g["dpc_assign"], 5).apply(g["x"]).gather(1, order[..., None].expand(-1, -1, 8))
    torch.testing.assert_close(map.apply(x)[:, 1:], mean, **close)
    assert torch.equal(map.anchors[:, 1:] - 1, g["dpc_centers"].gather(1, order))


def test_sinkhorn_transports_evenly_to_the_medoids():
    sizes = torch.rand(2, 17) + 0.5
    seen = random_view(sizes=sizes)
    map = Sinkhorn(r=10, iterations=50, eps=0.5).reduce(seen)
    x, centres = seen.features[:, 1:], map.anchors[:, 1:] - 1
    centres = x.gather(1, centres[..., None].expand(-1, -1, 8))
    share = sinkhorn_shares(x, centres, 0.5, 50)
    torch.testing.assert_close(map.dense_share()[:, 1:, 1:], share, **close)
    torch.testing.assert_close(map.sizes()[:, 1:], torch.full((2, 6), 16 / 6), rtol=1e-3, atol=0)
    mass = share * sizes[:, None, 1:]
    torch.testing.assert_close(map.dense()[:, 1:, 1:], mass / mass.sum(-1, keepdim=True), **close)


# ---- token transforming: no authors' code, so its laws -------------------------------------------------------------


@pytest.mark.parametrize("anchors", ["attention", "uniform"])
@pytest.mark.parametrize("hard", [True, False])
def test_a_cold_token_transforming_merges_with_the_nearest_anchor(anchors, hard):
    sizes = torch.rand(2, 17) + 0.5
    seen = random_view(sizes=sizes)
    map = TokenTransforming(r=9, temperature=1e-5, anchors=anchors, hard_anchors=hard).reduce(seen)
    keys = torch.nn.functional.normalize(seen.keys.mean(1)[:, 1:], dim=-1)
    at = (map.anchors[:, 1:, None] - 1).expand(-1, -1, 4)
    nearest = (keys.gather(1, at) @ keys.transpose(1, 2)).argmax(1)
    group = torch.cat([torch.zeros(2, 1, dtype=torch.int64), 1 + nearest], dim=1)
    torch.testing.assert_close(map.dense(), TokenMap.merge(group, 8, weight=sizes).dense(), **close)
    torch.testing.assert_close(map.sizes(sizes), TokenMap.merge(group, 8).sizes(sizes), **close)


def test_token_transforming_does_not_mind_the_order_of_tokens():
    seen, order = random_view(), torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(16)])
    attention = seen.attention(slice(None))[:, :, order][..., order]
    moved = view(seen.features[:, order], keys=seen.keys[:, :, order], attention=attention)
    method = TokenTransforming(r=9)
    a, b = (method.reduce(v).apply(v.features) for v in (seen, moved))
    for row in range(2):  # the same outputs, in the order of their anchors
        assert torch.cdist(a[row], b[row]).amin(1).max() < 1e-5
    torch.testing.assert_close(a[:, 0], b[:, 0])


def test_as_many_hard_anchors_as_tokens_change_nothing():
    torch.manual_seed(0)
    metric, all_of_them = torch.randn(2, 9, 4), torch.arange(9).expand(2, 9)
    map = TokenMap.transform(anchor_shares(metric, all_of_them, 0.1), torch.rand(2, 9) + 0.5)
    assert torch.equal(map.dense(), torch.eye(9).expand(2, 9, 9))
    x = torch.randn(2, 9, 5)
    assert torch.equal(map.apply(x), x)


def test_token_transforming_keeps_what_cls_attends_to():
    seen = random_view()
    map = TokenTransforming(r=9).reduce(seen)
    best = ranked(importance(seen)[:, 1:])[:, :7].sort(dim=-1).values + 1
    assert torch.equal(map.anchors[:, 1:], best)
    own = map.dense_share()[:, 1:].gather(2, best[:, None].expand(-1, 7, -1))
    assert torch.equal(own, torch.eye(7).expand(2, 7, 7))
    uniform = TokenTransforming(r=12, anchors="uniform").reduce(seen)
    assert uniform.anchors[0].tolist() == [0, 3, 7, 11, 15]


# ---- CenterCLIP ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "params"), [("euc", {}), ("cos", {"distance": "cosine"}), ("euc_prenorm", {"pre_norm": True})]
)
def test_centerclip_keeps_the_official_medoids(case, params):
    g = golden("centerclip_kmedoids")
    x = torch.cat([torch.zeros(3, 1, 8), g["X"]], dim=1)
    map = CenterCLIP(at=0, centers=6, **params).reduce(view(x))
    assert torch.equal(map.anchors[:, 1:] - 1, g[f"{case}_medoids"]) and map.is_selection
    mean = CenterCLIP(at=0, centers=6, mean=True, **params).reduce(view(x))
    expected = TokenMap.merge(g[f"{case}_assign"], 6).apply(g["X"])
    torch.testing.assert_close(mean.apply(x)[:, 1:], expected, **close)


def test_centerclip_joins_the_frames_of_official_segments():
    g = golden("centerclip_kmedoids")
    batch, frames, segments, patches, k = g["seg_cfg"].tolist()
    f = frames // segments
    method = CenterCLIP(at=6, frames=f, centers=k)
    assert [method.join(i) for i in (5, 6, 7)] == [1, f, 1]
    x = g["seg_x"].reshape(batch * segments, f * (1 + patches), -1)
    protected = (torch.arange(x.shape[1]) % (1 + patches) == 0).expand(x.shape[:2])
    seen = view(x, layer=6, layers=12, protected=protected, grid=(f, 3, 3))
    torch.testing.assert_close(method.reduce(seen).apply(x), g["seg_out"], **close)


def test_centerclip_on_images():
    assert CenterCLIP(at=2, centers=4).reduce(idle_view(layer=1)) is None
    assert CenterCLIP(at=0, centers=1.0).reduce(random_view()) is None
    assert CenterCLIP(at=0).reduce(random_view()) is None  # fewer patches than centres
    assert CenterCLIP(at=0, centers=0.25).reduce(random_view()).n_out == 5
    with pytest.raises(ThriftError, match="the model has 3 layers; write at=0 to at=2"):
        CenterCLIP().reduce(idle_view(layer=0, layers=3))


def test_more_than_a_layer_has_is_clipped_and_said():
    seen = view(torch.randn(1, 9, 8), prefix=1, layer=0, layers=2)
    with pytest.warns(UserWarning, match="r=99 is all that a layer has: it is clipped"):
        assert DPCKNN(r=99).reduce(seen).n_out == 2
