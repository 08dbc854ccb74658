"""Multi-criteria matching against the authors' numbers (golden/vision), and its laws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenthrift.core.tokenmap import TokenMap
from tokenthrift.ops.fusion import groups_of, multi_criteria_matching
from tokenthrift.ops.matching import bipartite_soft_matching, most_mergeable

GOLDEN = Path(__file__).parents[1] / "golden" / "vision"
close = {"rtol": 1e-5, "atol": 1e-6}


def golden(name):
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}.npz").items()}


def first_tokens(n, protected, batch=2):
    return (torch.arange(n) < protected).expand(batch, n)


def test_equals_the_official_matrix():
    g = golden("matrix_form")
    groups = multi_criteria_matching(
        g["x"],
        6,
        received=g["mctf_attn"].mean((1, 2)),
        sizes=g["size"].squeeze(-1),
        protected=first_tokens(17, 1, batch=1),
    )
    map = groups.map(g["size"].squeeze(-1))
    ours, theirs = (w[0, w[0].gt(0).to(torch.uint8).argmax(-1).argsort()] for w in (map.dense(), g["mctf_W"]))
    torch.testing.assert_close(ours, theirs, **close)


def test_one_direction_and_similarity_alone_is_token_merging():
    torch.manual_seed(0)
    x, protected = torch.randn(3, 21, 6), first_tokens(21, 1, batch=3)
    ours = multi_criteria_matching(x, 7, protected=protected, bidirectional=False)
    assert torch.equal(ours.group, bipartite_soft_matching(x, 7, protected).group)


def test_what_joined_a_token_is_taken_along():
    # Token 2 joins 1, its twin; then 1 joins 0: all three end in one group that stands at 0.
    x = torch.tensor([[[1.0, 0.1], [1.0, 0.0], [1.0, 0.0], [-1.0, 1.0], [0.0, -1.0], [0.3, -1.0]]])
    groups = multi_criteria_matching(x, 2)
    assert groups.group.tolist() == [[0, 0, 0, 1, 2, 3]]
    assert groups.anchor.tolist() == [[0, 3, 4, 5]]


def test_groups_of_tokens_that_stay_join_or_go():
    groups = groups_of(torch.tensor([[0, 3, -1, 3, 0]]), 2)
    assert groups.group.tolist() == [[0, 1, -1, 1, 0]] and groups.anchor.tolist() == [[0, 3]]


@pytest.mark.parametrize("criterion", ["received", "sizes"])
def test_uninformative_and_small_tokens_go_first(criterion):
    x = torch.ones(1, 8, 4)
    values = torch.tensor([[9.0, 9, 1, 1, 9, 9, 9, 9]])
    groups = multi_criteria_matching(x, 1, **{criterion: values}, tau_info=1, tau_size=1)
    assert groups.group[0, 2] == groups.group[0, 3] and groups.n_groups == 7


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(2, 23),
    r=st.integers(1, 14),
    prefix=st.integers(0, 4),
    bidirectional=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_laws_of_merging(batch, tokens, r, prefix, bidirectional, seed):
    torch.manual_seed(seed)
    x, sizes = torch.randn(batch, tokens, 3), torch.rand(batch, tokens) + 0.5
    received, protected = torch.rand(batch, tokens), first_tokens(tokens, prefix, batch)
    groups = multi_criteria_matching(
        x, r, received=received, sizes=sizes, protected=protected, bidirectional=bidirectional
    )
    if groups is None:
        assert most_mergeable(tokens, protected) == 0
        return
    map = groups.map(sizes)
    assert map.n_out == tokens - min(r, most_mergeable(tokens, protected))
    w, u = map.dense(), map.unmerge(torch.eye(map.n_out).expand(batch, -1, -1))
    torch.testing.assert_close(w @ u, torch.eye(map.n_out).expand(batch, -1, -1), **close)
    torch.testing.assert_close(w.sum(-1), torch.ones(batch, map.n_out), **close)
    torch.testing.assert_close(map.sizes(sizes).sum(-1), sizes.sum(-1), **close)
    assert torch.equal(map.owner.gather(1, map.anchors), torch.arange(map.n_out).expand(batch, -1))
    assert (map.anchors.diff(dim=-1) > 0).all()
    front = min(prefix, map.n_out)
    assert torch.equal(map.apply(x)[:, :front], x[:, :front])
    assert torch.equal(map.sizes()[:, :front], torch.ones(batch, front))


def test_protected_tokens_anywhere_neither_join_nor_receive():
    torch.manual_seed(0)
    protected = torch.zeros(2, 12, dtype=torch.bool)
    protected[0, [2, 5]] = protected[1, [1, 3]] = True
    map = multi_criteria_matching(torch.randn(2, 12, 4), 99, protected=protected).map()
    assert (map.sizes().gather(1, map.owner)[protected] == 1).all()
    assert map.n_out == 12 - 5


def test_degenerate_inputs_give_no_nan_and_are_deterministic():
    x = torch.zeros(1, 9, 3)
    x[:, 4:] = torch.tensor([1.0, -1.0, 1.0])
    x[:, 6] *= -1
    zeros = torch.zeros(1, 9)
    a, b = (multi_criteria_matching(x, 3, received=zeros, sizes=zeros + 1) for _ in range(2))
    assert torch.equal(a.group, b.group) and a.n_groups == 6
    assert isinstance(a.map(zeros), TokenMap) and a.map(zeros).dense().isfinite().all()


@pytest.mark.parametrize(("tokens", "prefix", "r"), [(1, 0, 3), (2, 2, 3), (5, 5, 3), (8, 0, 0), (8, 0, -2)])
def test_nothing_to_merge_is_none(tokens, prefix, r):
    assert multi_criteria_matching(torch.randn(1, tokens, 4), r, protected=first_tokens(tokens, prefix, 1)) is None
