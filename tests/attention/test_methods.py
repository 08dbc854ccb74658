"""What each method promises, on views of random keys."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch

import tokenthrift as tt
from attention_plans import EACH, plan
from tiny_models import prompt, tiny
from tokenthrift.attention.fasa import FASA
from tokenthrift.attention.quest import page_bounds, page_scores
from tokenthrift.core.view import View
from tokenthrift.models.frequency_chunks import agreement
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
    first = select(view(query, keys[:, :, :48], memory=memory))[:, 0, 2:-3]
    near = query + 0.01 * other
    second = select(view(near, keys[:, :, :49], memory=memory))[:, 0, 2:-3]
    assert torch.equal(first, second)
    mixed = torch.stack([near[0], other[1]])
    third = select(view(mixed, keys, memory=memory))[:, 0, 2:-3]
    assert torch.equal(third[0], first[0])
    fresh = select(view(other, keys))[:, 0, 2:-3]
    assert torch.equal(third[1], fresh[1])
    assert not torch.equal(third[1], first[1])
    always = method("token_select(budget=12, sinks=2, local=3, similarity=1.1)").select
    always(view(query, keys[:, :, :48], memory=(memory := {})))
    assert torch.equal(always(view(other, keys, memory=memory))[:, 0, 2:-3], fresh)


def test_fasa_with_all_chunks_reads_the_largest_products():
    query, keys, _ = tensors()
    every = [[[0, 1, 2, 3]] * 2]
    chosen = method(f"fasa(budget=9, dense=0, heads=query, chunks={every})").select(view(query, keys))
    products = (query.view(2, 2, 3, 8) @ keys.mT).flatten(1, 2)
    assert torch.equal(chosen.sort(-1).values, products.topk(9).indices.sort(-1).values)
    together = method(f"fasa(budget=9, dense=0, chunks={every})").select(view(query, keys))
    mean = (products * 0.35).softmax(-1).unflatten(1, (2, 3)).mean(2)
    assert torch.equal(together.sort(-1).values, mean.topk(9).indices.sort(-1).values)


def test_fasa_looks_at_the_dominant_channels_only_and_copies_each_key_once():
    query, keys, _ = tensors(n=60)
    fasa, memory = method("fasa(budget=9, dense=0, chunks=[[[0, 2], [3, 1]]])"), {}
    for n in (50, 51, 52, 60):
        chosen = fasa.select(view(query, keys[:, :, :n], memory=memory))
        others = keys[:, :, :n].clone()
        others[:, 0][..., [1, 3, 5, 7]] = 100  # what head 0 does not look at
        assert torch.equal(chosen[:, 0], fasa.select(view(query, others))[:, 0])
        if n > 50:  # what is known of old keys is not looked up again
            others = keys[:, :, :n].clone()
            others[:, :, :50] = 100
            assert torch.equal(chosen, fasa.select(view(query, others, memory={**memory, "dominant": cut(memory, 50)})))
    assert memory["dominant"].rows.shape == (2, 2, 60, 4)


def cut(memory, count):
    kept = deepcopy(memory["dominant"])
    kept.cut(count)
    return kept


@pytest.mark.parametrize("chunks", [[[[0, 1]]], [[[0, 4], [1, 2]]]])
def test_fasa_names_a_layer_that_its_chunks_do_not_fit(chunks):
    query, keys, _ = tensors()
    with pytest.raises(tt.ThriftError, match=r"layer 0.*2 key/value heads of 4 chunks"):
        method(f"fasa(budget=9, dense=0, chunks={chunks})").select(view(query, keys))


def test_fasa_needs_to_know_the_chunks():
    query, keys, _ = tensors()
    with pytest.raises(tt.ThriftError, match="must know the chunks"):
        method("fasa(budget=9, dense=0)").select(view(query, keys))


def test_agreement_is_one_where_a_pair_is_all_that_there_is():
    made = torch.Generator().manual_seed(0)
    query, key = torch.randn(4, 5, 8, generator=made), torch.randn(2, 30, 8, generator=made)
    key[0][..., [0, 1, 3, 4, 5, 7]] = 0  # the products of head 0 come from channels 2 and 6
    found = agreement(query, key, top=6)
    assert found.shape == (2, 4)
    assert found[0, 2] == 1
    assert (found[1] < 0.8).all()
    # By hand, for one pair of the other head: what the last query and its own pair have in common.
    one = agreement(query[2:3, -1:], key[1:], top=6)
    full = (query[2, -1] @ key[1].T).topk(6).indices.tolist()
    part = (query[2, -1, [1, 5]] @ key[1][:, [1, 5]].T).topk(6).indices.tolist()
    assert one[0, 1] == pytest.approx(len({*full} & {*part}) / 6)


def test_agreement_looks_back_only():
    made = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 5, 8, generator=made), torch.randn(2, 30, 8, generator=made)
    later = key.clone()
    later[:, -4:] = 50  # hidden from the first of the five
    assert torch.equal(agreement(query[:, :1], key[:, :26], 6), agreement(query[:, :1], later[:, :26], 6))
    first = agreement(query[:, :1], key[:, :26], 6)
    rest = [agreement(query[:, i : i + 1], key[:, : 26 + i], 6) for i in range(1, 5)]
    torch.testing.assert_close(agreement(query, key, 6), torch.stack([first, *rest]).mean(0))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "fasa.json"
    model = tiny("gemma3_text")
    FASA.calibrate(model, tokens=60, queries=10, top=12).save(path)
    return model, path


def test_a_calibration_is_written_read_and_applied(calibrated):
    model, path = calibrated
    inputs = prompt(length=40)
    with tt.apply(f"fasa(budget=12, dense=0, keep=2, chunks='{path}')", model) as session:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert session.report().stages["attention"].kept < 0.4
    bound = method(f"fasa(keep=2, chunks='{path}')").bind(model)
    found = json.loads(path.read_text())["data"]["agreement"]
    assert [len(layer) for layer in found] == [0, 2, 0]  # two of Gemma's layers have a sliding window
    assert len(bound.chunks) == 1
    for head, agrees in zip(bound.chunks[0], found[1], strict=True):
        assert sorted(agrees[c] for c in head) == sorted(agrees)[-2:]
    again = FASA.calibrate(model, tokens=60, queries=10, top=12)
    assert again.data["agreement"] == found


def test_calibrations_of_other_models_and_other_files_are_refused(calibrated, tmp_path):
    _, path = calibrated
    with pytest.raises(tt.ThriftError, match="another model"), tt.apply(f"fasa(chunks='{path}')", tiny("llama")):
        pass
    with pytest.raises(tt.ThriftError, match="never calibrated"), tt.apply("fasa", tiny("llama")):
        pass
    other = tmp_path / "other.json"
    other.write_text("{}")
    for wrong in (other, tmp_path / "none.json"):
        with pytest.raises(tt.ThriftError, match="tokenthrift calibrate fasa"):
            tt.Plan.parse(f"fasa(chunks='{wrong}')")


@pytest.mark.parametrize(
    "options", [{"tokens": 20, "top": 18}, {"top": 0}, {"queries": 0}, {"top": 2.5}, {"tokens": 900}]
)
def test_calibrations_that_cannot_be_made_are_refused_in_one_line(options):
    with pytest.raises(tt.ThriftError) as error:
        FASA.calibrate(tiny("llama"), **{"tokens": 60, "queries": 10, "top": 12, **options})
    assert "\n" not in str(error.value)


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
        "fasa(budget=0)",
        "fasa(keep=0)",
        "fasa(dense=-1)",
        "fasa(heads=all)",
        "fasa(chunks=[])",
        "fasa(chunks=[[[0, 1], [2]]])",
        "fasa(chunks=[[[0, 0]]])",
        "fasa(chunks=[[[-1]]])",
        "fasa(chunks=3)",
        "cache=quest()",
    ],
)
def test_impossible_parameters_are_refused_in_one_line(wrong):
    with pytest.raises(tt.ThriftError) as error:
        tt.Plan.parse(wrong)
    assert "\n" not in str(error.value)
