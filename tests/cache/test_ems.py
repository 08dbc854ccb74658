"""EMS: what is a centre, what joins one, what is left out."""

from __future__ import annotations

import pytest
import torch

import tokenthrift as tt
from cache.test_methods import left_padding, made_of, view


def ems(**params):
    return tt.Plan(cache={"ems": params}).at("cache")[0]


def test_the_score_is_the_larger_of_global_and_local_brought_to_one_mean():
    v = view(n=12, heads=2)
    rows = v.attention(12)[0]
    seen = torch.arange(12, 0, -1)
    everywhere, near = rows.sum(1) / seen, rows[:, -3:].sum(1) / seen.clamp(max=3)
    want = torch.maximum(near, everywhere * near.mean(-1, keepdim=True) / everywhere.mean(-1, keepdim=True))
    torch.testing.assert_close(ems(budget=8, window=3).score(v)[0], want)


@pytest.mark.parametrize("params", [{"candidates": 0}, {"threshold": 1}])
def test_without_merges_it_only_evicts(params):
    method, v = ems(budget=9, window=3, **params), view(n=30, batch=2)
    map = method.reduce(v)
    assert (map.sizes() == 1).all()
    score = method.score(v)
    score[..., -3:] = torch.inf
    assert torch.equal(map.anchors, score.topk(9).indices.sort().values)
    want = v.keys.gather(2, map.anchors.unsqueeze(-1).expand(-1, -1, -1, 8))
    torch.testing.assert_close(map.apply(v.keys), want, rtol=0, atol=0)


def test_equal_keys_and_values_merge_to_themselves():
    v = view(n=30)
    v.keys[:], v.values[:] = v.keys[:, :, :1].clone(), v.values[:, :, :1].clone()
    map = ems(budget=10, window=3, candidates=0.5, threshold=0.99).reduce(v)
    torch.testing.assert_close(map.apply(v.keys), v.keys[:, :, :10])
    assert map.sizes().sum(-1).tolist() == [[15, 15]]


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3])
def test_every_candidate_joins_the_centre_most_like_it_or_the_zero_class(threshold):
    v, method = view(n=40), ems(budget=10, window=3, candidates=1.5, threshold=threshold)
    map, score = method.reduce(v), method.score(v)
    assert map.n_out == 10
    joined = dropped = 0
    for head in range(2):
        centres = map.anchors[0, head]
        rank = score[0, head].index_fill(0, centres, -1).argsort(descending=True)
        k, p = (torch.nn.functional.normalize(x[0, head], dim=-1) for x in (v.keys, v.values))
        like = (k @ k[centres].T).clamp(min=0) * (p @ p[centres].T).clamp(min=0)
        for place, token in enumerate(rank[:30].tolist()):
            best, owner = like[token].max(), int(map.owner[0, head, token])
            if place < 15 and best >= threshold:
                assert owner == int(like[token].argmax())
                joined += 1
            else:
                assert owner == -1
                dropped += 1
        assert map.sizes()[0, head].sum() == map.kept[0, head].sum()
    assert joined and dropped


def test_merged_entries_are_means_weighted_by_score():
    v, method = view(n=40), ems(budget=6, window=2, candidates=3, threshold=0)
    map, score = method.reduce(v), method.score(v)
    entry = int(map.sizes()[0, 1].argmax())
    sources = (map.owner[0, 1] == entry).nonzero().squeeze(-1)
    assert len(sources) > 1
    weight = score[0, 1, sources] / score[0, 1, sources].sum()
    torch.testing.assert_close(map.apply(v.values)[0, 1, entry], weight @ v.values[0, 1, sources])


def test_rows_with_fewer_tokens_than_the_budget_keep_them_as_they_are():
    v = view(n=30, batch=2)
    v = made_of(v.queries, v.keys, v.values, mask=left_padding(30, (22, 0)))
    map = ems(budget=12, window=3, threshold=0.0).reduce(v)
    assert map.mask[0].sum(-1).tolist() == [8, 8]
    assert map.sizes()[0].max() == 1 and map.sizes()[1].max() > 1


@pytest.mark.parametrize(
    "wrong", ["budget=32", "window=0", "candidates=-1", "candidates=inf", "threshold=1.1", "threshold=nan", "budget=0"]
)
def test_impossible_parameters_are_refused_in_one_line(wrong):
    with pytest.raises(tt.ThriftError) as error:
        tt.Plan.parse(f"ems({wrong})")
    assert "\n" not in str(error.value)
