"""Bipartite matching against the authors' numbers (golden/vision), and its laws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenthrift.core.tokenmap import TokenMap
from tokenthrift.ops.matching import bipartite_soft_matching, kth_bipartite_soft_matching, most_mergeable

GOLDEN = Path(__file__).parents[1] / "golden" / "vision"
close = {"rtol": 1e-5, "atol": 1e-5}


def golden(name):
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}.npz").items()}


def first_tokens(n, protected, batch=2):
    return (torch.arange(n) < protected).expand(batch, n)


def rows_by_first_source(rows, source):
    """The authors put the tokens left in A first, we keep the order: sort both by each token's first source."""
    order = source.gt(0).to(torch.uint8).argmax(-1).argsort(dim=-1)
    return rows.gather(1, order.unsqueeze(-1).expand_as(rows))


@pytest.mark.parametrize(("case", "protected"), [("cls", 1), ("nocls", 0), ("dist", 2), ("clip", 1)])
def test_equals_the_official_merge(case, protected):
    g = {k.removeprefix(f"{case}_"): v for k, v in golden("tome_bsm").items() if k.startswith(f"{case}_")}
    n = g["x"].shape[1]
    mask = first_tokens(n, protected) if protected else None
    map = bipartite_soft_matching(g["metric"], int(g["r"]), mask).map(g["size"].squeeze(-1))

    assert map.n_out == g["out"].shape[1]
    ours, theirs = map.dense(), g["source"]
    unmerged = theirs.transpose(1, 2) @ g["out"]
    torch.testing.assert_close(map.unmerge(map.apply(g["x"])), unmerged, **close)
    if case != "dist":  # the authors' unmerge forgets where their merge put the distillation token
        torch.testing.assert_close(unmerged, g["unmerged"], **close)
    torch.testing.assert_close(
        rows_by_first_source((ours > 0).float(), ours), rows_by_first_source(theirs, theirs), rtol=0, atol=0
    )
    for mine, official in [
        (map.apply(g["x"]), g["out"]),
        (map.sizes(g["size"].squeeze(-1)).unsqueeze(-1), g["out_size"]),
        (TokenMap.merge(map.target, map.n_out).apply(g["x"]), g["meanmerge"]),
    ]:
        torch.testing.assert_close(rows_by_first_source(mine, ours), rows_by_first_source(official, theirs), **close)


@pytest.mark.parametrize(("case", "protected"), [("cls", 1), ("nocls", 0), ("dist", 2), ("clip", 1)])
def test_the_official_order_is_the_authors_one(case, protected):
    g = {k.removeprefix(f"{case}_"): v for k, v in golden("tome_bsm").items() if k.startswith(f"{case}_")}
    mask = first_tokens(g["x"].shape[1], protected)
    groups = bipartite_soft_matching(g["metric"], int(g["r"]), mask, order="official")
    map = groups.map(g["size"].squeeze(-1))
    torch.testing.assert_close(map.apply(g["x"]), g["out"], **close)
    torch.testing.assert_close(map.sizes(g["size"].squeeze(-1)).unsqueeze(-1), g["out_size"], **close)
    assert torch.equal((map.dense() > 0).float(), g["source"])
    if not protected:
        assert torch.equal(bipartite_soft_matching(g["metric"], 6, order="official").group, groups.group)


def test_two_layers_chain_to_the_official_sources():
    g = golden("tome_bsm")
    x, protected = g["chain_x"], first_tokens(17, 1)
    first = bipartite_soft_matching(g["chain_metric1"], int(g["chain_r1"]), protected, order="official").map()
    x1, s1 = first.apply(x), first.sizes()
    torch.testing.assert_close(x1, g["chain_x1"], **close)
    torch.testing.assert_close(s1.unsqueeze(-1), g["chain_s1"], **close)

    mask = protected[:, : first.n_out]
    second = bipartite_soft_matching(g["chain_metric2"], int(g["chain_r2"]), mask, order="official").map(s1)
    torch.testing.assert_close(second.apply(x1), g["chain_x2"], **close)
    torch.testing.assert_close(second.sizes(s1).unsqueeze(-1), g["chain_s2"], **close)
    both = first.then(second)
    torch.testing.assert_close(both.apply(x), g["chain_x2"], **close)
    assert torch.equal((both.dense() > 0).float(), g["chain_source"])


def test_every_kth_token_receives_as_in_the_official_code():
    g = golden("tome_bsm")
    groups = kth_bipartite_soft_matching(g["kth_metric"], int(g["kth_k"]))
    map = groups.map()
    torch.testing.assert_close(map.apply(g["kth_x"]), g["kth_out"], **close)
    torch.testing.assert_close(map.unmerge(g["kth_out"]), g["kth_unmerged"], **close)
    assert torch.equal(groups.anchor, torch.arange(2, 18, 3).expand(2, 6))


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 20), k=st.integers(1, 6), prefix=st.integers(0, 4), seed=st.integers(0, 2**16))
def test_laws_of_merging_to_every_kth(tokens, k, prefix, seed):
    torch.manual_seed(seed)
    prefix = min(prefix, tokens)
    groups = kth_bipartite_soft_matching(torch.randn(2, tokens, 4), k, first_tokens(tokens, prefix))
    left = (tokens - prefix) // k
    if groups is None:
        assert left == 0 or k == 1
        return
    map = groups.map()
    assert map.n_out == prefix + left  # the tokens after the last receiver are not lost
    assert torch.equal(map.sizes().sum(-1), torch.full((2,), float(tokens)))
    assert torch.equal(map.owner[:, :prefix], torch.arange(prefix).expand(2, -1))
    assert (map.sizes()[:, :prefix] == 1).all()
    assert torch.equal(map.owner.gather(1, map.anchors), torch.arange(map.n_out).expand(2, -1))


def test_equals_the_official_matrices():
    g = golden("matrix_form")
    map = bipartite_soft_matching(g["metric"], 5, first_tokens(17, 1, batch=1)).map(g["size"].squeeze(-1))
    w, u = map.dense(), map.unmerge(torch.eye(map.n_out).unsqueeze(0))
    torch.testing.assert_close(rows_by_first_source(w, w), rows_by_first_source(g["tome_W"], g["tome_W"]), **close)
    # columns of U belong to outputs: compare them in the order of the outputs' first sources
    u, official = u.transpose(1, 2), g["tome_U"].transpose(1, 2)
    torch.testing.assert_close(rows_by_first_source(u, u), rows_by_first_source(official, official), **close)
    torch.testing.assert_close(
        rows_by_first_source(map.apply(g["x"]), w), rows_by_first_source(g["tome_out"], g["tome_W"]), **close
    )


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(2, 23),
    dim=st.integers(1, 6),
    r=st.integers(1, 14),
    prefix=st.integers(0, 4),
    order=st.sampled_from(["position", "official"]),
    seed=st.integers(0, 2**16),
)
def test_laws_of_merging(batch, tokens, dim, r, prefix, order, seed):
    torch.manual_seed(seed)
    metric, x, sizes = torch.randn(batch, tokens, dim), torch.randn(batch, tokens, 5), torch.rand(batch, tokens) + 0.5
    protected = first_tokens(tokens, prefix, batch)
    groups = bipartite_soft_matching(metric, r, protected, order)
    if groups is None:
        assert most_mergeable(tokens, protected) == 0
        return
    map = groups.map(sizes)
    assert map.n_out == tokens - min(r, most_mergeable(tokens, protected))
    w, u = map.dense(), map.unmerge(torch.eye(map.n_out).expand(batch, -1, -1))
    torch.testing.assert_close(w @ u, torch.eye(map.n_out).expand(batch, -1, -1), **close)
    torch.testing.assert_close(w.sum(-1), torch.ones(batch, map.n_out), **close)
    torch.testing.assert_close(map.sizes(sizes).sum(-1), sizes.sum(-1), **close)
    torch.testing.assert_close(map.apply(x), w @ x, **close)
    # merging is a projection, survivors keep their order, protected tokens stay in front, alone and bit-exact
    merged = map.apply(x)
    torch.testing.assert_close(map.apply(map.unmerge(merged)), merged, **close)
    if order == "position":
        assert (map.anchors.diff(dim=-1) > 0).all()
    assert torch.equal(map.owner.gather(1, map.anchors), torch.arange(map.n_out).expand(batch, -1))
    front = min(prefix, map.n_out)
    assert torch.equal(merged[:, :front], x[:, :front])
    assert torch.equal(map.sizes()[:, :front], torch.ones(batch, front))


def test_protected_tokens_anywhere_neither_join_nor_receive():
    torch.manual_seed(0)
    metric, protected = torch.randn(2, 12, 4), torch.zeros(2, 12, dtype=torch.bool)
    protected[0, [2, 5]] = protected[1, [1, 3]] = True
    map = bipartite_soft_matching(metric, 99, protected).map()
    alone = map.sizes().gather(1, map.owner)
    assert (alone[protected] == 1).all()
    assert map.n_out == 12 - 5  # 5 of row 0's six tokens in A are free, and both rows remove as many


def test_zero_keys_and_ties_give_no_nan_and_are_deterministic():
    metric = torch.zeros(1, 9, 3)
    metric[:, 4:] = 1
    map = bipartite_soft_matching(metric, 3).map()
    again = bipartite_soft_matching(metric, 3).map()
    assert map.dense().isfinite().all() and torch.equal(map.target, again.target)
    assert torch.equal(map.sizes().sum(-1), torch.tensor([9.0]))


def test_half_precision_keys_are_compared_in_float32():
    torch.manual_seed(0)
    metric = torch.randn(2, 20, 16).to(torch.bfloat16)
    a, b = bipartite_soft_matching(metric, 6), bipartite_soft_matching(metric.float(), 6)
    assert torch.equal(a.group, b.group)


@pytest.mark.parametrize(("tokens", "prefix"), [(1, 0), (2, 2), (3, 2), (5, 5), (8, 0)])
def test_nothing_to_merge_is_none(tokens, prefix):
    metric, protected = torch.randn(1, tokens, 4), first_tokens(tokens, prefix, 1)
    assert bipartite_soft_matching(metric, 0, protected) is None
    assert (bipartite_soft_matching(metric, 3, protected) is None) == (most_mergeable(tokens, protected) == 0)
