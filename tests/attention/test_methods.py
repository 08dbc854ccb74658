"""What each method promises, on views of random keys."""

from __future__ import annotations

import pytest
import torch

import tokenthrift as tt
from attention_plans import EACH, plan
from tokenthrift.attention.quest import page_bounds, page_scores
from tokenthrift.core.view import View
from tokenthrift.ops.gathered import gathered_attention


def method(text):
    return tt.Plan.parse(text).at("attention")[0]


def tensors(n=40, batch=2, heads=6, kv_heads=2, dim=8, seed=0):
    made = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, 1, dim, generator=made)
    keys, values = (torch.randn(batch, kv_heads, n, dim, generator=made) for _ in range(2))
    return query, keys, values


def view(query, keys, mask=None, layer=0, layers=4, memory=None, shared=None):
    return View(
        queries=query, keys=keys, scaling=0.35, mask=mask, layer=layer, layers=layers,
        memory={} if memory is None else memory, shared={} if shared is None else shared,
    )  # fmt: skip


def left_padding(n, pads):
    return torch.stack([torch.arange(n) >= pad for pad in pads])


def chosen_by(name, budget, query, keys, mask=None, **options):
    """What the method reads where it does not read everything: TidalDecode two layers on."""
    made, shared = method(plan(name, budget, **options)), {}
    first = made.select(view(query, keys, mask, shared=shared))
    return first if name != "tidal_decode" else made.select(view(query, keys, mask, layer=1, shared=shared))


@EACH
def test_a_budget_of_all_entries_reads_everything(name):
    query, keys, _ = tensors()
    for budget in (40, 41, 5000):
        assert chosen_by(name, budget, query, keys) is None


@EACH
@pytest.mark.parametrize("n", [37, 40, 41])
def test_as_many_as_asked_for_and_each_once(name, n):
    query, keys, _ = tensors(n)
    chosen = chosen_by(name, 12, query, keys)
    short = -n % 4 if name == "quest" else 0  # the newest page is not full yet
    assert chosen.shape == (2, 2, 12 - short)
    assert (chosen.sort(-1).values.diff(dim=-1) > 0).all()
    assert chosen.min() >= 0
    assert chosen.max() < n


@EACH
def test_padding_is_never_preferred(name):
    """Rows of which 2 and 20 of 40 columns are real: the first reads both of its own."""
    query, keys, _ = tensors()
    mask = left_padding(40, (38, 20))
    real = mask.unsqueeze(1).expand(-1, 2, -1).gather(-1, chosen_by(name, 12, query, keys, mask))
    assert (real[0].sum(-1) == 2).all()
    assert real[1].all()


@EACH
def test_selection_stays_close_to_dense_attention_where_few_entries_matter(name):
    """One key of each head is the query's own, enlarged: whoever finds it has nearly all of the attention."""
    query, keys, values = tensors(n=64, heads=2)
    keys[:, :, 21] = query.squeeze(2) * 12
    chosen = chosen_by(name, 20, query, keys)
    dense = gathered_attention(query, keys, values, torch.arange(64).expand(2, 2, -1), 0.35)
    torch.testing.assert_close(gathered_attention(query, keys, values, chosen, 0.35), dense, atol=1e-4, rtol=1e-4)


def test_quest_bounds_are_bounds():
    query, keys, _ = tensors(n=48)
    products = (query.view(2, 2, 3, 8) @ keys.mT).flatten(1, 2).unflatten(-1, (12, 4))
    scores = page_scores(query, page_bounds(keys, 4))
    assert (scores >= products.amax(-1) - 1e-5).all()


def test_quest_in_pages_of_one_reads_the_largest_products():
    query, keys, _ = tensors(n=30, heads=2)
    chosen = method("quest(budget=8, page=1, dense=0)").select(view(query, keys))
    products = (query @ keys.mT).squeeze(2)
    products[..., -1] = float("inf")  # the newest is always read
    assert torch.equal(chosen.sort(-1).values, products.topk(8).indices.sort(-1).values)


def test_quest_remembers_bounds_and_adds_those_of_new_pages():
    query, keys, _ = tensors(n=60)
    quest, memory = method("quest(budget=12, page=4, dense=0)"), {}
    mask = left_padding(60, (6, 0))
    for n in range(30, 60):
        grown = quest.select(view(query, keys[:, :, :n], mask[:, :n], memory=memory))
        fresh = quest.select(view(query, keys[:, :, :n], mask[:, :n]))
        assert torch.equal(grown, fresh)
    torch.testing.assert_close(memory["pages"].rows, page_bounds(keys[:, :, :56], 4, mask[:, :56]))


@pytest.mark.parametrize("name", ["quest", "tidal_decode"])
def test_query_heads_choose_together_or_each_for_itself(name):
    query, keys, _ = tensors()
    assert chosen_by(name, 12, query, keys, heads="group").shape[1] == 2
    own = chosen_by(name, 12, query, keys, heads="query")
    assert own.shape[1] == 6
    for head in range(6):  # as if the head were alone with its key/value head
        alone = chosen_by(name, 12, query[:, head : head + 1], keys[:, head // 3 : head // 3 + 1])
        assert torch.equal(own[:, head : head + 1].sort(-1).values, alone.sort(-1).values)


def test_tidal_decode_hands_choices_to_the_layers_after_the_chooser():
    query, keys, _ = tensors()
    other, _, _ = tensors(seed=1)
    tidal, shared = method("tidal_decode(budget=12, dense=1, reselect=3)"), {}
    made = [
        tidal.select(view(q, keys, layer=i, layers=6, shared=shared)) for i, q in enumerate([query] * 3 + [other] * 3)
    ]
    assert [m is None for m in made] == [True, True, False, True, False, False]
    assert torch.equal(made[4], made[5])
    assert not torch.equal(made[2], made[4])


def test_tidal_decode_names_a_layer_that_the_model_does_not_have():
    query, keys, _ = tensors()
    with pytest.raises(tt.ThriftError, match="reselect=8, but only 4 layers"):
        method("tidal_decode(budget=12, reselect=8)").select(view(query, keys))


def test_token_select_keeps_first_and_newest_and_votes_on_the_rest():
    query, keys, _ = tensors()
    chosen = method("token_select(budget=12, sinks=2, local=3)").select(view(query, keys))[:, 0].sort(-1).values
    assert chosen[:, :2].tolist() == [[0, 1]] * 2
    assert chosen[:, -3:].tolist() == [[37, 38, 39]] * 2
    products = query.view(2, 2, 3, 8) @ keys[:, :, 2:37].mT
    votes = products.softmax(-1).sum((1, 2))
    assert torch.equal(chosen[:, 2:-3], votes.topk(7).indices.sort(-1).values + 2)


def test_token_select_votes_again_only_in_rows_whose_query_moved():
    query, keys, _ = tensors(n=50)
    other, _, _ = tensors(seed=3)
    select, memory = method("token_select(budget=12, sinks=2, local=3)").select, {}
    first = select(view(query, keys[:, :, :48], memory=memory))[:, 0, 5:]
    near = query + 0.01 * other
    second = select(view(near, keys[:, :, :49], memory=memory))[:, 0, 5:]
    assert torch.equal(first, second)
    mixed = torch.stack([near[0], other[1]])
    third = select(view(mixed, keys, memory=memory))[:, 0, 5:]
    assert torch.equal(third[0], first[0])
    fresh = select(view(other, keys))[:, 0, 5:]
    assert torch.equal(third[1], fresh[1])
    assert not torch.equal(third[1], first[1])
    always = method("token_select(budget=12, sinks=2, local=3, similarity=1.1)").select
    always(view(query, keys[:, :, :48], memory=(memory := {})))
    assert torch.equal(always(view(other, keys, memory=memory))[:, 0, 5:], fresh)


@pytest.mark.parametrize(
    "wrong",
    [
        "quest(budget=0)",
        "quest(budget=0.5)",
        "quest(budget=8)",
        "quest(page=0)",
        "quest(dense=-1)",
        "quest(heads=layer)",
        "tidal_decode(budget=-1)",
        "tidal_decode(dense=-1)",
        "tidal_decode(reselect=2)",
        "tidal_decode(heads=all)",
        "token_select(budget=112)",
        "token_select(sinks=-1)",
        "token_select(local=0)",
        "token_select(similarity=nan)",
        "cache=quest()",
    ],
)
def test_impossible_parameters_are_refused_in_one_line(wrong):
    with pytest.raises(tt.ThriftError) as error:
        tt.Plan.parse(wrong)
    assert "\n" not in str(error.value)
