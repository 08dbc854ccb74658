"""Clustering against the authors' numbers (golden/vision), and its laws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenthrift.core.tokenmap import TokenMap
from tokenthrift.ops.clustering import (
    anchor_shares,
    distances,
    dpc_knn,
    farthest_first,
    k_medoids,
    query_pooling,
    sinkhorn_shares,
    unit_rows,
    weighted_k_medoids,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "vision"
close = {"rtol": 1e-5, "atol": 1e-6}


def golden(name):
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(GOLDEN / f"{name}.npz").items()}


@pytest.mark.parametrize("case", ["euc", "cos", "euc_prenorm"])
def test_k_medoids_are_centerclips(case):
    g = golden("centerclip_kmedoids")
    metric, pre_norm = "cosine" if case == "cos" else "euclidean", case == "euc_prenorm"
    x = unit_rows(g["X"]) if pre_norm else g["X"]
    assert torch.equal(farthest_first(x, 6, metric), g[f"{case}_kkz"])
    medoids, assign = k_medoids(g["X"], 6, metric, pre_norm=pre_norm)
    assert torch.equal(medoids, g[f"{case}_medoids"])
    assert torch.equal(assign, g[f"{case}_assign"])


def test_weighted_k_medoids_are_the_official_ones():
    g = golden("tokenreduction_zoo")
    medoids, assign = weighted_k_medoids(g["x"], 5, g["kmed_weight"].squeeze(-1), iterations=3)
    assert torch.equal(medoids, g["kmed_idx"])
    assert torch.equal(assign, g["kmed_assign"])
    assert torch.equal(TokenMap.select(medoids, 16).apply(g["x"]), g["kmed_centers"])


@pytest.mark.parametrize("noisy", [True, False])
def test_dpc_knn_is_the_official_one(noisy):
    g = golden("tokenreduction_zoo")
    torch.manual_seed(73)
    noise = torch.rand(2, 16) * 1e-6 if noisy else None
    centres, assign = dpc_knn(g["x"], int(g["dpc_clusters"]), int(g["dpc_k"]), noise)
    assert torch.equal(centres, g["dpc_centers"])
    assert torch.equal(assign, g["dpc_assign"])
    map = TokenMap.merge(assign, 5, weight=g["kmed_weight"].squeeze(-1))
    torch.testing.assert_close(map.apply(g["x"]), g["dpc_merged"], rtol=1e-5, atol=1e-5)
    assert torch.equal(map.owner, g["dpc_idx_token"])
    torch.testing.assert_close(map.weight.unsqueeze(-1), g["dpc_agg_weight"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("case", "i"), [("", 0), ("_b", 2)])
def test_sinkhorn_is_the_official_one(case, i):
    g = golden("tokenreduction_zoo")
    eps, iterations = g["sinkhorn_cfg"][i : i + 2].tolist()
    shares = sinkhorn_shares(g["x"], g["sinkhorn_centers"], eps, int(iterations))
    torch.testing.assert_close(shares, g[f"sinkhorn_w{case}"], **close)
    unit = torch.nn.functional.normalize(g["x"], dim=-1)
    torch.testing.assert_close(shares @ unit, g[f"sinkhorn_out{case}"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 16), **close)


def test_query_pooling_is_patch_mergers():
    g = golden("tokenreduction_zoo")
    out, weights = query_pooling(g["x"], g["pm_queries"], (g["pm_ln_w"], g["pm_ln_b"]))
    torch.testing.assert_close(weights, g["pm_attn"], **close)
    torch.testing.assert_close(out, g["pm_out"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(query_pooling(g["x"], g["pm_queries"], scaled=True)[1], weights)


def cluster(name, x, k, seed=0):
    if name == "weighted":
        generator = torch.Generator().manual_seed(seed)
        return weighted_k_medoids(x, k, torch.rand(x.shape[:2], generator=generator))
    if name == "dpc":
        return dpc_knn(x, k)
    return k_medoids(x, k, name)


NAMES = ["euclidean", "cosine", "weighted", "dpc"]


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    tokens=st.integers(1, 20),
    k=st.integers(1, 24),
    equal=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_laws_of_clustering(name, tokens, k, equal, seed):
    torch.manual_seed(seed)
    x = torch.randn(3, tokens, 4)
    x[:, :equal] = x[:, :1]  # equal tokens must neither empty a cluster nor be chosen twice for one
    medoids, assign = cluster(name, x, k)
    k = min(k, tokens)
    assert medoids.shape == (3, k)
    assert torch.equal(assign.gather(1, medoids), torch.arange(k).expand(3, k))  # each is of its own cluster
    d = distances(x, name if name == "cosine" else "euclidean")
    nearest = d.gather(2, medoids[:, None].expand(-1, tokens, -1)).amin(-1)
    own = d.gather(2, medoids.gather(1, assign).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(own, nearest, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_affect_each_other(name):
    torch.manual_seed(0)
    x = torch.randn(4, 30, 6)
    x[2] *= 50
    medoids, assign = cluster(name, x, 7) if name != "weighted" else weighted_k_medoids(x, 7, x.norm(dim=-1))
    for i in range(4):
        alone = x[i : i + 1]
        m, a = cluster(name, alone, 7) if name != "weighted" else weighted_k_medoids(alone, 7, alone.norm(dim=-1))
        assert torch.equal(m[0], medoids[i]) and torch.equal(a[0], assign[i])


def test_k_medoids_find_the_clusters_and_keep_their_order():
    torch.manual_seed(0)
    centres = 10 * torch.eye(4)
    x = centres.repeat_interleave(5, 0) + 0.1 * torch.randn(2, 20, 4)
    medoids, assign = k_medoids(x, 4)
    assert torch.equal(assign, torch.arange(4).repeat_interleave(5).expand(2, 20))
    assert (medoids.diff(dim=-1) > 0).all()
    for row in range(2):
        for cluster in range(4):
            members = x[row, 5 * cluster : 5 * cluster + 5]
            assert medoids[row, cluster] == 5 * cluster + torch.cdist(members, members).sum(-1).argmin()


def test_as_many_medoids_as_tokens_are_all_of_them_in_order():
    x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    for metric in ("euclidean", "cosine"):
        assert torch.equal(k_medoids(x, 9, metric)[0], torch.arange(9).expand(2, 9))


def test_half_precision_is_clustered_in_float32():
    x = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for name in NAMES:
        for half, full in zip(cluster(name, x, 5), cluster(name, x.float(), 5), strict=True):
            assert torch.equal(half, full)


def test_sharp_shares_are_the_nearest_anchor():
    torch.manual_seed(0)
    metric, anchors = torch.randn(2, 15, 6), torch.tensor([[1, 4, 9], [0, 2, 14]])
    unit = torch.nn.functional.normalize(metric, dim=-1)
    nearest = (unit.gather(1, anchors[..., None].expand(-1, -1, 6)) @ unit.transpose(1, 2)).argmax(1)
    for hard in (True, False):
        shares = anchor_shares(metric, anchors, 1e-4, hard)
        torch.testing.assert_close(shares, torch.nn.functional.one_hot(nearest, 3).transpose(1, 2).float(), **close)
        soft = anchor_shares(metric, anchors, 0.5, hard)
        torch.testing.assert_close(soft.sum(1), torch.ones(2, 15), **close)
        own = soft.gather(2, anchors[:, None].expand(-1, 3, -1))
        assert torch.equal(own, torch.eye(3).expand(2, 3, 3)) == hard
