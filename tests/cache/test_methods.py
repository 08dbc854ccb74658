"""What each cache method keeps, from made-up views."""

from __future__ import annotations

import pytest
import torch

import tokenthrift as tt
from tokenthrift.models.cache_stage import cache_view


def view(n=20, heads=4, kv_heads=2, batch=1, seed=0, mask=None):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, h, n, 8, generator=g) for h in (heads, kv_heads, kv_heads))
    return cache_view(q, k, v, mask, 8**-0.5, 0, 1)


def kept(plan, v):
    return tt.Plan.parse(plan).at("cache")[0].reduce(v).source


def test_streaming_llm_keeps_sinks_and_the_newest():
    assert kept("streaming_llm(budget=7, sinks=3)", view()).tolist() == [[[0, 1, 2, 16, 17, 18, 19]] * 2]
    assert kept("streaming_llm(budget=0.25, sinks=0)", view()).tolist() == [[[15, 16, 17, 18, 19]] * 2]


def test_streaming_llm_counts_sinks_from_the_first_real_token():
    mask = torch.zeros(1, 1, 20, 20).masked_fill(torch.arange(20) < 6, torch.finfo(torch.float32).min)
    assert kept("streaming_llm(budget=5, sinks=2)", view(mask=mask)).tolist() == [[[6, 7, 17, 18, 19]] * 2]


def test_knorm_keeps_the_smallest_keys_of_each_head():
    v = view()
    norms = v.keys.norm(dim=-1)
    for head in range(2):
        want = sorted(norms[0, head].topk(6, largest=False).indices.tolist())
        assert kept("knorm(budget=6)", v)[0, head].tolist() == want


def test_snapkv_keeps_the_window_and_what_it_attends_to():
    v = view(n=60)
    v.keys[:, :, 10] = v.queries[:, ::2, -1] * 6  # heads 0 and 2 point at token 10
    v.keys[:, :, 10] += v.queries[:, 1::2, -1] * 6
    index = kept("snapkv(budget=6, window=2, kernel=3)", v)[0]
    for head in index.tolist():
        assert head[-2:] == [58, 59]
        assert {9, 10, 11} <= set(head)  # pooling brings the neighbours


def test_snapkv_window_shrinks_under_a_small_ratio():
    assert kept("snapkv(budget=0.1, window=32)", view(n=50)).tolist() == [[[45, 46, 47, 48, 49]] * 2]


@pytest.mark.parametrize("name", ["knorm", "snapkv", "streaming_llm"])
def test_keeping_everything_is_the_identity(name):
    for budget in (1.0, 20, 5000):
        options = ", window=2" if name == "snapkv" else ""
        assert tt.Plan.parse(f"{name}(budget={budget}{options})").at("cache")[0].reduce(view()).is_identity


@pytest.mark.parametrize(
    "plan",
    [
        "knorm(budget=0)",
        "knorm(budget=1.5)",
        "knorm(budget=nan)",
        "snapkv(budget=16)",
        "snapkv(kernel=4)",
        "snapkv(window=0)",
        "streaming_llm(budget=4, sinks=4)",
        "streaming_llm(sinks=-1)",
        "knorm(budget=big)",
    ],
)
def test_impossible_parameters_are_refused_in_one_line(plan):
    with pytest.raises(tt.ThriftError) as error:
        tt.Plan.parse(plan)
    assert "\n" not in str(error.value)
