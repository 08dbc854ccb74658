"""PiToMe against the authors' numbers (golden/vision/pitome.npz), its parameters and its laws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

import tokenthrift as tt
from models.encoders import text_encoder, texts
from tokenthrift import Plan, ThriftError, View
from tokenthrift.core.view import Lazy
from tokenthrift.ops.matching import bipartite_soft_matching
from tokenthrift.vision.pitome import PiToMe, PiToMeText, alternate_ranks, energy, gaussian_energy, most_similar_ranks
from vision.tiny import ENCODERS, RETURN_TOKENS, build, run

GOLDEN = Path(__file__).parents[1] / "golden" / "vision"
close = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def golden(case):
    held = np.load(GOLDEN / "pitome.npz")
    return {k.removeprefix(f"{case}_"): torch.from_numpy(held[k]) for k in held if k.startswith(f"{case}_")}


def first_tokens(n, protected, batch=2):
    return (torch.arange(n) < protected).expand(batch, n)


def view(metric, sizes, prefix, layer=0, layers=4, x=None):
    """As of a layer whose two heads' keys are ``metric`` on average."""
    n = metric.shape[1]
    return View(
        features=metric if x is None else x,
        keys=torch.stack([metric - 1, metric + 1], dim=1),
        sizes=sizes,
        protected=first_tokens(n, prefix, metric.shape[0]),
        prefix=prefix,
        grid=(1, 1, n - prefix),
        layer=layer,
        layers=layers,
    )


def in_order(rows, source):
    """The authors put protected tokens first, in the order of their energy: sort by each row's first source."""
    order = source.gt(0).to(torch.uint8).argmax(-1).argsort(dim=-1)
    return rows.gather(1, order.unsqueeze(-1).expand_as(rows))


def equals(map, g):
    ours, theirs = map.dense(), g["source"]
    assert torch.equal(in_order((ours > 0).float(), ours), in_order(theirs, theirs))
    sizes = g["size"].squeeze(-1)
    torch.testing.assert_close(in_order(map.apply(g["x"]), ours), in_order(g["out"], theirs), **close)
    merged = map.sizes(sizes).unsqueeze(-1)
    torch.testing.assert_close(in_order(merged, ours), in_order(g["out_size"], theirs), **close)


CASES = [("late_cls", 1, 0.0), ("early_cls", 1, 1.0), ("late_nocls", 0, 0.0)]


@pytest.mark.parametrize(("case", "prefix", "bsm"), CASES)
def test_energies_and_their_order_are_the_official_ones(case, prefix, bsm):
    g = golden(case)
    metric = normalize(g["metric"], dim=-1)
    scores = energy(metric, float(g["margin_ratio"][0]), first_tokens(metric.shape[1], prefix))
    torch.testing.assert_close(scores[:, prefix:], g["energy"], **close)
    assert torch.equal(scores[:, prefix:].argsort(dim=-1, descending=True), g["order"])
    assert (scores[:, :prefix] == -torch.inf).all()


@pytest.mark.parametrize(("case", "prefix", "bsm"), CASES)
def test_one_layer_is_the_official_merge(case, prefix, bsm):
    g = golden(case)
    margin, ratio = g["margin_ratio"].tolist()
    seen = view(g["metric"], g["size"].squeeze(-1), prefix)
    equals(PiToMe(margin=margin, ratio=ratio, bsm=bsm).reduce(seen), g)
    removed = g["x"].shape[1] - g["out"].shape[1]
    equals(PiToMe(margin=margin, r=removed, bsm=bsm).reduce(seen), g)


@pytest.mark.parametrize(("case", "prefix"), [("late_cls", 1), ("late_nocls", 0)])
def test_the_official_output_in_its_own_order(case, prefix):
    """Protected tokens in the order of their energy, then those at odd ranks: nothing is lost by keeping positions."""
    g = golden(case)
    r = g["x"].shape[1] - g["out"].shape[1]
    map = PiToMe(margin=float(g["margin_ratio"][0]), r=r, bsm=0.0).reduce(
        view(g["metric"], g["size"].squeeze(-1), prefix)
    )
    order = g["order"] + prefix
    stays = torch.cat([torch.arange(prefix).expand(2, -1), order[:, 2 * r :], order[:, 1 : 2 * r : 2]], dim=1)
    rows = map.owner.gather(1, stays)
    torch.testing.assert_close(
        map.apply(g["x"]).gather(1, rows.unsqueeze(-1).expand(-1, -1, g["x"].shape[-1])), g["out"], **close
    )


def test_plain_matching_by_ratio_is_the_official_one():
    g = golden("plainbsm")
    n, ratio = g["x"].shape[1], float(g["margin_ratio"][1])
    r = int(n - n * ratio)  # of all tokens, CLS too
    equals(bipartite_soft_matching(g["metric"], r, first_tokens(n, 1)).map(g["size"].squeeze(-1)), g)


def test_the_text_variant_is_the_official_merge():
    g = golden("text")
    margin, ratio = g["margin_ratio"].tolist()
    seen = view(g["metric"], torch.ones(2, 19), 1)
    map = PiToMeText(margin=margin, ratio=ratio).reduce(seen)
    r = 19 - g["out"].shape[1]
    scores = gaussian_energy(normalize(g["metric"], dim=-1), margin, seen.protected)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    stays = torch.cat([order[:, -1:], order[:, 2 * r : -1], order[:, r : 2 * r]], dim=1)  # CLS, protected, takers
    rows = map.owner.gather(1, stays).unsqueeze(-1)
    torch.testing.assert_close(map.apply(g["x"]).gather(1, rows.expand_as(g["out"])), g["out"], **close)
    torch.testing.assert_close(map.sizes().unsqueeze(-1).gather(1, rows), g["out_size"], **close)
    masked = torch.stack([((map.dense() > 0) * g["mask"].transpose(1, 2)).amax(-1)], dim=-1)
    torch.testing.assert_close(masked.gather(1, rows), g["out_mask"], **close)


def test_equals_the_official_matrix():
    g = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "matrix_form.npz").items()}
    map = PiToMe(r=3, margin=0.5, bsm=0.0).reduce(view(g["metric"], g["size"].squeeze(-1), 1))
    w, official = map.dense(), g["pitome_W"]
    torch.testing.assert_close(in_order(w, w), in_order(official, official), **close)
    torch.testing.assert_close(in_order(map.apply(g["x"]), w), in_order(g["pitome_out"], official), **close)


@pytest.mark.parametrize("method", [PiToMe, PiToMeText])
@settings(max_examples=30, deadline=None)
@given(
    patches=st.integers(1, 18),
    prefix=st.integers(0, 3),
    layer=st.integers(0, 3),
    r=st.integers(1, 12),
    seed=st.integers(0, 2**16),
)
def test_laws_of_merging(method, patches, prefix, layer, r, seed):
    torch.manual_seed(seed)
    n = patches + prefix
    metric, x, sizes = torch.randn(2, n, 4), torch.randn(2, n, 5), torch.rand(2, n) + 0.5
    map = method(r=[r] * 4).reduce(view(metric, sizes, prefix, layer))
    if map is None:
        assert patches < 2
        return
    assert map.n_out == n - min(r, patches // 2)
    w, u = map.dense(), map.unmerge(torch.eye(map.n_out).expand(2, -1, -1))
    torch.testing.assert_close(w @ u, torch.eye(map.n_out).expand(2, -1, -1), **close)
    torch.testing.assert_close(w.sum(-1), torch.ones(2, map.n_out), **close)
    torch.testing.assert_close(map.sizes(sizes).sum(-1), sizes.sum(-1), **close)
    assert torch.equal(map.apply(x)[:, :prefix], x[:, :prefix])
    assert (map.anchors.diff(dim=-1) > 0).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16))
def test_the_order_of_the_tokens_does_not_matter(seed):
    torch.manual_seed(seed)
    metric, shuffle = normalize(torch.randn(2, 14, 6), dim=-1), torch.randperm(14)
    free = torch.zeros(2, 14, dtype=torch.bool)
    for merge in (alternate_ranks, most_similar_ranks):
        here, there = (merge(m, energy(m, 0.4, free), 4).map() for m in (metric, metric[:, shuffle]))
        together = [m.owner.unsqueeze(-1) == m.owner.unsqueeze(-2) for m in (here, there)]
        assert torch.equal(together[0][:, shuffle][:, :, shuffle], together[1])


def test_a_cluster_merges_and_what_stands_alone_is_protected():
    torch.manual_seed(0)
    crowd = normalize(torch.ones(1, 8, 16) + 0.1 * torch.randn(1, 8, 16), dim=-1)
    metric = torch.cat([torch.randn(1, 4, 16), crowd], dim=1)
    map = PiToMe(r=4, bsm=0.0).reduce(view(metric, torch.ones(1, 12), 0))
    assert (map.sizes()[0, :4] == 1).all() and map.sizes()[0, 4:].sum() == 8


def test_the_margin_falls_and_the_matching_changes_half_way():
    torch.manual_seed(0)
    metric, sizes = torch.randn(2, 17, 6), torch.ones(2, 17)
    unit, protected = normalize(metric, dim=-1), first_tokens(17, 1)
    for layer, merge in enumerate([most_similar_ranks, most_similar_ranks, most_similar_ranks, alternate_ranks]):
        margin = 0.8 - 0.8 * layer / 5
        want = merge(unit, energy(unit, margin, protected), 3).map()
        ours = PiToMe(r=3, margin=0.8).reduce(view(metric, sizes, 1, layer, layers=5))
        assert torch.equal(ours.owner, want.owner)


@pytest.mark.parametrize(
    ("method", "layer"),
    [
        (PiToMe(r=0), 0), (PiToMe(keep=1.0), 3), (PiToMe(ratio=1.0), 0), (PiToMe(r=[4]), 1),
        (PiToMeText(), 3), (PiToMeText(ratio=0.5), 3), (PiToMeText(r=4), 3), (PiToMeText(keep=1.0), 0),
    ],
)  # fmt: skip
def test_a_layer_without_reduction_computes_nothing(method, layer):
    def forbidden():
        raise AssertionError("a layer without reduction must compute nothing")

    seen = view(torch.randn(2, 17, 4), torch.ones(2, 17), 1, layer)
    for name in ("keys", "sizes", "protected"):
        seen.offer(name, Lazy(forbidden))
    assert method.reduce(seen) is None


def test_the_text_variant_reaches_its_share_in_its_layers_and_lists_name_any_layer():
    def left(method, layers=6):
        torch.manual_seed(0)
        n, counts = 41, []
        for layer in range(layers):
            seen = view(torch.randn(1, n, 4), torch.ones(1, n), 1, layer, layers)
            seen.offer("grid", (1, 1, 40))
            map = method.reduce(seen)
            n = n if map is None else map.n_out
            counts.append(n)
        return counts

    assert left(PiToMeText()) == [34, 27, 21, 21, 21, 21]
    assert left(PiToMeText(r=4)) == [37, 33, 29, 29, 29, 29]
    assert left(PiToMeText(r=[0, 0, 0, 0, 5])) == [41, 41, 41, 41, 36, 36]
    assert left(PiToMeText(ratio=0.75, layers=None))[:3] == [31, 24, 19]
    assert left(PiToMe())[-1] == 21


@pytest.mark.parametrize(
    ("call", "match"),
    [
        ("pitome(keep=0)", r"pitome keep=0 is not a share"),
        ("pitome(ratio=1.5)", r"pitome ratio=1.5 is not a share in \(0, 1\]; 0.5 keeps half of a layer's tokens"),
        ("pitome(ratio=0.9, keep=0.25)", "one of keep=..., r=... and ratio="),
        ("pitome(ratio=0.9, r=4)", "one of keep=..., r=... and ratio="),
        ("pitome(keep=0.25, r=4)", "pitome takes keep=... or r=..., not both"),
        ("pitome(margin=2)", r"write a number in \[-1, 1\]"),
        ("pitome(bsm=1.5)", "no share of the layers"),
        ("pitome_text(layers=0)", "removes nothing: write layers=3"),
        ("pitome_text(margin=1.0)", r"write a margin in \[-1, 1\)"),
        ("pitome_text(fall=-1)", r"a fall in \[0, 2\]"),
        ("pitome_text(ratio=0)", "pitome_text ratio=0 is not a share"),
    ],
)
def test_bad_parameters_are_refused(call, match):
    with pytest.raises(ThriftError, match=match):
        Plan.parse(f"vision={call}")


@pytest.mark.parametrize("call", ["pitome()", "pitome(ratio=0.9)", "pitome(r=(8, -1.0))", "pitome_text(layers=None)"])
def test_plans_print_back_the_same(call):
    plan = Plan.parse(f"vision={call}")
    assert Plan.parse(str(plan)) == plan == Plan.from_yaml(plan.to_yaml())


@pytest.mark.parametrize("name", RETURN_TOKENS)
@pytest.mark.parametrize("call", ["pitome(keep=0.4)", "pitome(ratio=0.8, prop_attn=True)", "pitome(r=3, bsm=0.0)"])
def test_vision_encoders_run_it(name, call):
    model, prefix = build(name), ENCODERS[name][1]
    dense = run(model)
    with tt.apply(f"vision={call}", model) as session:
        out = run(model)
    assert out.isfinite().all() and out.shape[1] < dense.shape[1]
    map = session.provenance()["vision"]
    assert map.n_out == out.shape[1]
    assert torch.equal(map.owner[:, :prefix], torch.arange(prefix).expand(2, -1))
    assert torch.equal(run(model), dense)
    with tt.apply("vision=pitome(keep=1.0)", model):
        assert torch.equal(run(model), dense)


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_text_encoders_run_it_and_padding_counts_for_nothing(name):
    model, batch = text_encoder(name), texts(21, 9, 14)
    with tt.apply("vision=pitome_text(ratio=0.7)", model) as session:
        together = model(**batch).last_hidden_state
        left = session.provenance()["vision"].mask.sum(-1).tolist()
        alone = model(**{k: v[1:2, :9] for k, v in batch.items()}).last_hidden_state
    assert left[0] < 21 and left[1] < 9 and left[2] < 14
    torch.testing.assert_close(together[1, :9], alone[0], **close)
    with tt.apply("vision=pitome_text(keep=1.0)", model):
        same = model(**batch).last_hidden_state
    assert torch.equal(same, model(**batch).last_hidden_state)
