"""What each cache method keeps, from made-up views."""

from __future__ import annotations

import pytest
import torch

import tokenthrift as tt
from cache_plans import EACH_AND_VARIANTS, EACH_EVICTING, plan
from tokenthrift.cache.tree_kv import tournament
from tokenthrift.models.cache_stage import cache_view
from tokenthrift.ops.rotary import Rotary


def view(n=20, heads=4, kv_heads=2, batch=1, seed=0, mask=None, layer=0, layers=1):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, h, n, 8, generator=g) for h in (heads, kv_heads, kv_heads))
    return made_of(q, k, v, mask, layer=layer, layers=layers)


def made_of(q, k, v, mask=None, start=0, layer=0, layers=1):
    """A view of a layer that rotated channels ``i`` and ``i + 4`` together, from position ``start`` on."""
    angle = torch.arange(start, start + k.shape[-2])[None, :, None] * 0.3 ** torch.arange(4).repeat(2)

    def turn(x, cos, sin):
        return x * cos[:, None] + torch.cat([-x[..., 4:], x[..., :4]], dim=-1) * sin[:, None]

    return cache_view(q, k, v, mask, 8**-0.5, layer, layers, lambda: Rotary(angle.cos(), angle.sin(), turn))


def left_padding(n, pads):
    """The model's 4-D additive mask of a batch whose rows have so many padding tokens on their left."""
    hidden = torch.arange(n) < torch.tensor(pads)[:, None]
    return torch.zeros(len(pads), 1, 1, n).masked_fill(hidden[:, None, None], torch.finfo(torch.float32).min)


def kept(plan, v):
    return tt.Plan.parse(plan).at("cache")[0].reduce(v).source


def test_streaming_llm_keeps_sinks_and_the_newest():
    assert kept("streaming_llm(budget=7, sinks=3)", view()).tolist() == [[[0, 1, 2, 16, 17, 18, 19]] * 2]
    assert kept("streaming_llm(budget=0.25, sinks=0)", view()).tolist() == [[[15, 16, 17, 18, 19]] * 2]


def test_streaming_llm_counts_sinks_from_the_first_real_token():
    assert kept("streaming_llm(budget=5, sinks=2)", view(mask=left_padding(20, [6]))).tolist() == [
        [[6, 7, 17, 18, 19]] * 2
    ]


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


def test_tova_follows_the_last_query_with_one_choice_for_all_heads():
    v = view()
    mean = v.attention(1)[0, :, 0].mean(0)
    mean[-1] = 1
    assert kept("tova(budget=6)", v).tolist() == [[sorted(mean.topk(6).indices.tolist())] * 2]


def test_keydiff_keeps_the_key_that_points_elsewhere():
    v = view()
    v.keys.abs_()
    v.keys[0, 1, 7] *= -1
    assert 7 in kept("keydiff(budget=1)", v)[0, 1].tolist()


def test_h2o_keeps_the_newest_and_the_most_attended():
    v = view()
    v.keys[:, :, 3] = 0
    v.queries[:] = v.queries.abs()
    v.keys[:, :, 3] += 3  # every query likes it
    assert kept("h2o(budget=4, recent=0.75)", v).tolist() == [[[3, 17, 18, 19]] * 2]
    assert kept("h2o(budget=4, recent=1)", v).tolist() == [[[16, 17, 18, 19]] * 2]


def test_h2o_per_query_lets_a_late_token_win():
    v = view(heads=2)
    v.queries[:], v.keys[:] = 1, 0
    v.keys[:, :, 15] = 4  # five queries give it nearly all they have; fifteen give token 0 about a fifth on average
    assert kept("h2o(budget=2, recent=0)", v).tolist() == [[[0, 15]] * 2]
    assert kept("h2o(budget=1, recent=0, per_query=True)", v).tolist() == [[[15]] * 2]


def test_spatten_keeps_both_ends_and_the_most_attended_between():
    v = view(mask=left_padding(20, [3]))
    best = [sorted((6 + head[6:15].topk(2).indices).tolist()) for head in v.received[0]]
    want = [[[3, 4, 5, *middle, 15, 16, 17, 18, 19]] for middle in best]
    assert kept("spatten(budget=10, sinks=3, recent=0.5)", v)[0].tolist() == [head[0] for head in want]
    assert kept("spatten(budget=4, sinks=3, recent=1.0)", v).tolist() == [[[3, 4, 5, 19]] * 2]  # the sinks come first
    assert kept("spatten(budget=0.1, sinks=3)", v).shape == (1, 2, 2)


def test_lagkv_shares_the_budget_between_partitions():
    index = kept("lagkv(budget=18, sinks=2, lag=8)", view(n=2 + 4 * 8))[0]  # 2 sinks, 8 of the tail, 8 of 3 partitions
    for head in index.tolist():
        assert head[:2] == [0, 1] and head[-8:] == list(range(26, 34))
        assert [sum(2 + 8 * i <= t < 10 + 8 * i for t in head) for i in range(3)] == [2, 3, 3]


def test_lagkv_on_a_short_prompt_keeps_sinks_and_the_newest():
    assert kept("lagkv(budget=6, sinks=2)", view()).tolist() == [[[0, 1, 16, 17, 18, 19]] * 2]


def test_lagkv_survives_constant_values():
    v = view(n=34)
    v.values[:] = 1
    assert kept("lagkv(budget=18, sinks=2, lag=8)", v).shape == (1, 2, 18)


def test_pyramid_kv_keeps_the_total_and_equals_snapkv_in_its_middle():
    counts = [
        kept("pyramid_kv(budget=20, window=4, beta=5)", view(n=60, layer=i, layers=3)).shape[-1] for i in range(3)
    ]
    assert counts == [36, 20, 4]
    v = view(n=60, layer=1, layers=3)
    same = kept("snapkv(budget=20, window=4, kernel=3)", v)
    assert torch.equal(kept("pyramid_kv(budget=20, window=4, kernel=3, beta=5)", v), same)


def test_pyramid_kv_is_constant_where_the_last_layer_could_not_hold_the_window():
    assert tt.Plan.parse("pyramid_kv(budget=100, window=8, beta=20)").at("cache")[0].budgets(1000, 4) == [100] * 4


def test_ada_kv_gives_a_head_what_the_others_need_less():
    v = view(n=40)
    v.keys[:, 1] *= 0.1  # the smallest keys are all in head 1
    for safeguard, counts in ((0, [0, 20]), (0.25, [2, 18]), (1, [10, 10])):
        map = tt.Plan.parse(f"ada_kv(budget=10, base=knorm, safeguard={safeguard})").at("cache")[0].reduce(v)
        assert map.mask.sum(-1).tolist() == [counts]


def test_ada_kv_may_deal_out_a_part_of_its_budget_evenly():
    v = view(n=40)
    v.keys[:, 1] *= 0.1  # the smallest keys are all in head 1
    for safeguard, counts in ((0, [0, 20]), (0.25, [2, 17]), (1, [10, 10])):  # 20 * 0.75 + 2: what is left is rounded
        plan = f"ada_kv(budget=10, base=knorm, safeguard={safeguard}, safe=mix)"
        assert tt.Plan.parse(plan).at("cache")[0].reduce(v).mask.sum(-1).tolist() == [counts]


def test_ada_kv_trusts_heads_whose_scores_are_concentrated():
    """Both heads have as much attention to give; with its sum weighed, the one that spreads it out gets less."""
    method = tt.Plan.parse("ada_kv(base='snapkv(window=2)', budget=6, concentration=True)").at("cache")[0]
    scores = torch.tensor([[[0.4, 0.4, 0.1, 0.1, 2, 3], [0.25, 0.25, 0.25, 0.25, 2, 3]]])
    weighed = method._weighed(scores, torch.tensor([2]), 2)
    torch.testing.assert_close(weighed, scores * torch.tensor([[[0.8] * 4 + [1] * 2, [0.5] * 4 + [1] * 2]]))


@pytest.mark.parametrize("how", ["weighted", "pivot"])
def test_snapkv_may_merge_what_it_evicts_into_the_most_similar_kept(how):
    v = view(n=40, batch=2, mask=left_padding(40, [0, 7]))
    method = tt.Plan.parse(f"snapkv(budget=12, window=4, merge={how})").at("cache")[0]
    map, kept = method.reduce(v), tt.Plan.parse("snapkv(budget=12, window=4)").at("cache")[0].reduce(v)
    assert torch.equal(map.anchors, kept.anchors) and torch.equal(map.kept, v.mask[:, None].expand(-1, 2, -1))
    torch.testing.assert_close(map.dense().sum(-1), torch.ones(2, 2, 12))
    cosine = torch.nn.functional.cosine_similarity(v.keys[:, :, :, None], kept.apply(v.keys)[:, :, None], dim=-1)
    evicted = map.kept & ~kept.kept
    assert torch.equal(map.owner[evicted], cosine.argmax(-1)[evicted])
    # Where all keys are the same vector, so are their means, whatever the masses.
    same = torch.ones_like(v.keys)
    torch.testing.assert_close(map.apply(same), torch.ones(2, 2, 12, 8))


def test_pyramid_kv_may_leave_its_window_out_of_the_falling_budgets():
    budgets = tt.Plan.parse("pyramid_kv(budget=100, window=8, beta=20, apart=True)").at("cache")[0].budgets
    assert budgets(1000, 4) == [8 + 180, 8 + 122, 8 + 64, 8 + 6]  # 92 each: from 2 * 92 - 92 // 20 down, in equal steps
    assert budgets(184, 4) == [8 + 176, 8 + 120, 8 + 64, 8 + 8]  # the first layer has no more than 176 to keep
    assert budgets(150, 4) == [100] * 4 and budgets(1000, 1) == [100]


def test_tree_kv_lets_neighbouring_blocks_compete():
    """20 tokens, room for 12: 2 sinks, the last 4, and of the 14 between 6, as three blocks of two."""
    index = kept("tree_kv(budget=12, sinks=2, block=2)", view())[0]
    for head in index.tolist():
        assert head[:2] == [0, 1] and head[-4:] == [16, 17, 18, 19]
        blocks = head[2:8:2]
        assert head[3:8:2] == [b + 1 for b in blocks] and all(b % 2 == 0 for b in blocks)


def test_the_tournament_equals_one_comparison_after_the_other():
    g = torch.Generator().manual_seed(0)
    for room, start, n in ((1, 0, 9), (5, 0, 6), (5, 3, 23), (7, 6, 40), (4, 0, 4), (0, 0, 3)):
        score = torch.randn(2, n, generator=g)
        got = tournament(score, room, start).tolist()
        for head in range(2):
            left, place = list(range(room)), start
            for new in range(room, n if room else 0):
                left.append(new)
                one, other = left[place : place + 2]
                left.remove(other if score[head, one] > score[head, other] else one)
                place = (place + 1) % room
            assert got[head] == left, (room, start, n)


def test_expected_attention_is_the_mean_over_drawn_queries():
    """The closed form against exp(q·k) of Gaussian queries, rotated to the next position."""
    v = view(n=30, heads=2, kv_heads=2)
    method = tt.Plan.parse("expected_attention(budget=9, sinks=0, future=1, value_norm=False)").at("cache")[0]
    plain = v.rotary.undo(v.queries)[0, 0].double()
    covariance = torch.cov(plain.T, correction=0)
    torch.manual_seed(0)
    drawn = torch.distributions.MultivariateNormal(plain.mean(0), covariance).sample((200_000,))
    turned = v.rotary.ahead(1, v.mask).apply(drawn.float()[None, None])[0, 0]
    want = (turned @ v.keys[0, 0].T * v.scaling).exp().mean(0)
    torch.testing.assert_close(method.score(v)[0, 0], want / want.sum(), rtol=0.05, atol=1e-3)


def test_expected_attention_keeps_its_sinks():
    assert kept("expected_attention(budget=6, sinks=4, future=8)", view())[..., :4].tolist() == [[[0, 1, 2, 3]] * 2]


@EACH_AND_VARIANTS
def test_keeping_everything_is_the_identity(name):
    for budget in (1.0, 20, 5000):
        assert tt.Plan.parse(plan(name, budget)).at("cache")[0].reduce(view()).is_identity


@EACH_EVICTING
@pytest.mark.parametrize("budget", [12, 0.5])
def test_as_many_as_asked_for_in_order_and_each_once(name, budget):
    map = tt.Plan.parse(plan(name, budget)).at("cache")[0].reduce(view(n=24, batch=2, layer=1, layers=3))
    assert (map.mask.sum((1, 2)) == 2 * 12).all()
    if name != "ada_kv":
        assert map.source.shape == (2, 2, 12)
    assert (map.source.diff(dim=-1) > 0)[map.mask[..., 1:]].all()


@EACH_AND_VARIANTS
@pytest.mark.parametrize("pads", [(0, 9), (22, 3)])
def test_a_padded_row_keeps_what_it_keeps_alone(name, pads):
    """Padding is never kept, and a row does not notice that others are longer."""
    full = view(n=40, batch=2)
    parts = full.queries, full.keys, full.values
    map = tt.Plan.parse(plan(name, 14)).at("cache")[0].reduce(made_of(*parts, mask=left_padding(40, pads)))
    for row, pad in enumerate(pads):
        alone = tt.Plan.parse(plan(name, 14)).at("cache")[0]
        alone = alone.reduce(made_of(*(p[row : row + 1, :, pad:] for p in parts), start=pad))
        for head in range(2):
            real = map.mask[row, head]
            want = alone.dense()[0, head][alone.mask[0, head]]
            torch.testing.assert_close(map.dense()[row, head][real][:, pad:], want)
            assert torch.equal(map.anchors[row, head][real] - pad, alone.anchors[0, head][alone.mask[0, head]])
            assert not map.kept[row, head, :pad].any()
        # Those that round as their authors do may miss the sum by an entry a head.
        assert abs(int(map.mask[row].sum()) - 2 * min(14, 40 - pad)) <= (2 if "mixes" in name else 0)


@EACH_AND_VARIANTS
def test_half_precision_is_scored_like_single(name):
    v = view(n=32)
    halved = made_of(*(t.bfloat16() for t in (v.queries, v.keys, v.values)))
    exact = made_of(halved.queries.float(), halved.keys.float(), halved.values.float())
    assert torch.equal(kept(plan(name, 12), halved), kept(plan(name, 12), exact))


@pytest.mark.parametrize(
    "wrong",
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
        "tova(budget=0)",
        "keydiff(budget=-3)",
        "pyramid_kv(budget=8)",
        "pyramid_kv(kernel=2)",
        "pyramid_kv(beta=0.5)",
        "pyramid_kv(pooling=min)",
        "snapkv(pooling=median)",
        "snapkv(group=sum)",
        "snapkv(merge=average)",
        "lagkv(budget=4)",
        "lagkv(lag=1)",
        "lagkv(sinks=-1)",
        "h2o(recent=1.5)",
        "h2o(recent=nan)",
        "h2o(budget=2.0)",
        "h2o(recent=most)",
        "h2o(per_query=3)",
        "lagkv(lag=2.5)",
        "knorm(every=-1)",
        "knorm(budget=0.5, every=8)",
        "tree_kv(sinks=0)",
        "tree_kv(budget=4)",
        "tree_kv(recent=2)",
        "tree_kv(block=0)",
        "spatten(sinks=-1)",
        "spatten(budget=4)",
        "spatten(recent=1.1)",
        "spatten(budget=0.5, every=2)",
        "ada_kv(safeguard=1.5)",
        "ada_kv(safe=ceiling)",
        "ada_kv(base=pyramid_kv)",
        "ada_kv(base=prompt_lookup)",
        "ada_kv(base='snapkv(window=600)')",
        "ada_kv(base='knorm(every=4)')",
        "ada_kv(base='snapkv(merge=pivot)')",
        "ada_kv(base='knorm() tova()')",
        "expected_attention(sinks=512)",
        "expected_attention(future=0)",
        "expected_attention(epsilon=-1)",
    ],
)
def test_impossible_parameters_are_refused_in_one_line(wrong):
    with pytest.raises(tt.ThriftError) as error:
        tt.Plan.parse(wrong)
    assert "\n" not in str(error.value)
