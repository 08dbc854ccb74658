"""Selections and outputs equal those of the authors' code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tokenthrift as tt
from tokenthrift.attention.quest import page_bounds, page_scores
from tokenthrift.core.view import View
from tokenthrift.ops.gathered import gathered_attention

GOLDEN = Path(__file__).parents[1] / "golden" / "cache"


@pytest.fixture(scope="module")
def factory():
    return {k: torch.tensor(v) for k, v in np.load(GOLDEN / "kvcachefactory.npz").items()}


@pytest.fixture(scope="module")
def golden():
    return {k: torch.tensor(v) for k, v in np.load(GOLDEN / "selective_attention.npz").items()}


def method(plan):
    return tt.Plan.parse(plan).at("attention")[0]


def view_of(query, keys, layer=9, layers=32, shared=None, memory=None):
    return View(
        queries=query, keys=keys, scaling=keys.shape[-1] ** -0.5, mask=None, layer=layer, layers=layers,
        memory={} if memory is None else memory, shared={} if shared is None else shared,
    )  # fmt: skip


def test_quest_bounds_and_scores_equal_kvcache_factory(factory):
    """Its last page is short: 96 keys in pages of 10."""
    keys, query = factory["keys"], factory["queries"][:, :2, -1:]
    filled = torch.cat([keys, torch.zeros(2, 2, 4, 8)], dim=2)
    bounds = page_bounds(filled, 10, (torch.arange(100) < 96).expand(2, -1))
    torch.testing.assert_close(bounds[..., :8], factory["quest_pagemax10"])
    torch.testing.assert_close(bounds[..., 8:], factory["quest_pagemin10"])
    torch.testing.assert_close(page_scores(query, bounds), factory["quest_scores10"], atol=1e-5, rtol=1e-5)


def test_quest_tokens_equal_kvcache_factory(factory):
    """Where pages are whole and the newest one is kept."""
    chosen = method("quest(budget=32, page=8)").select(view_of(factory["queries"][:, :2, -1:], factory["keys"]))
    assert torch.equal(chosen.sort(-1).values, factory["quest_p8_b32_r8"])


@pytest.mark.parametrize(("n", "page", "pages"), [(100, 16, 4), (97, 16, 3), (96, 8, 5)])
@pytest.mark.parametrize("heads", ["group", "query"])
def test_quest_equals_the_reference_in_the_authors_tests(golden, n, page, pages, heads):
    """Their layout is tokens first, without sharing of key/value heads; the last page is often short."""
    name = f"quest_n{n}_p{page}_b{pages}"
    query, keys, values = (golden[f"{name}_{x}"].transpose(0, 1).unsqueeze(0) for x in "qkv")
    chosen = method(f"quest(budget={page * pages}, page={page}, heads={heads})").select(view_of(query, keys))
    want = golden[f"{name}_pages"].sort(-1).values
    for head in range(4):
        got = [int(p) for p in (chosen[0, head] // page).unique()]
        assert got == [*want[head].tolist(), (n - 1) // page]
    out = gathered_attention(query, keys, values, chosen, 8**-0.5)
    torch.testing.assert_close(out[0].transpose(0, 1), golden[f"{name}_out"], atol=1e-5, rtol=1e-5)


def test_tidal_decode_equals_the_authors_layers(golden):
    """Six layers in a row, grouped heads: layer 1 and 4 choose, 0 is dense, 2, 3 and 5 read what was chosen."""
    tidal, shared = method("tidal_decode(budget=10, dense=1, reselect=4, heads=query)"), {}
    for layer in range(6):
        query, keys, values = (golden[f"tidal_{x}{layer}"] for x in "qkv")
        chosen = tidal.select(view_of(query, keys, layer, 6, shared))
        assert (chosen is None) == (layer in (0, 1, 4))
        if chosen is None:
            chosen = torch.arange(keys.shape[2]).expand(1, 2, -1)
        out = gathered_attention(query, keys, values, chosen, 8**-0.5)
        torch.testing.assert_close(out, golden[f"tidal_out{layer}"], atol=1e-5, rtol=1e-5)


def test_token_select_equals_the_authors_selection(golden):
    """Of keys that both sides see at the same positions; without sharing of key/value heads."""
    select = method("token_select(budget=25, sinks=4, local=9)").select
    chosen = select(view_of(golden["token_select_q"], golden["token_select_k"]))
    assert torch.equal(chosen.sort(-1).values, golden["token_select_indices"].expand(1, 3, -1))


@pytest.mark.parametrize("heads", ["group", "query"])
def test_fasa_reads_the_keys_and_values_that_the_authors_code_gathers(golden, heads):
    """Of dominant channels that both sides are given; without sharing of key/value heads."""
    chunks, keys = golden["fasa_chunks"].tolist(), golden["fasa_k"]
    chosen = method(f"fasa(budget=14, dense=0, heads={heads}, chunks=[{chunks}])").select(
        view_of(golden["fasa_q"], keys, layer=0)
    )
    for all_of, want in ((keys, golden["fasa_keys"]), (golden["fasa_v"], golden["fasa_values"])):
        got = all_of.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, 16))
        order, wanted = (t[..., 0].argsort(-1).unsqueeze(-1).expand_as(t) for t in (got, want))
        assert torch.equal(got.gather(2, order), want.gather(2, wanted))
