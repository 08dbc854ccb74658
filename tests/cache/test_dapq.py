"""DapQ: its pseudo queries stand where the next tokens will, and then vote as these would."""

from __future__ import annotations

import pytest
import torch

import tokenthrift as tt
from cache.test_methods import left_padding, made_of, view
from tiny_models import prompt, tiny
from tokenthrift.cache.dapq import DapQ
from tokenthrift.models.cache_stage import CacheWatcher
from tokenthrift.ops.attention import attention_over


def dapq(**params):
    return tt.Plan(cache={"dapq": params}).at("cache")[0]


@pytest.mark.parametrize("pads", [(0, 0), (9, 0)])
def test_with_what_the_next_queries_hold_it_is_the_oracle(pads):
    """Where the prompt's last four queries have the content of the four that follow, their votes are those."""
    full = view(n=40, batch=2)
    queries, keys, values = full.queries, full.keys, full.values
    plain = full.rotary.undo(queries)
    plain[:, :, 32:36] = plain[:, :, 36:]
    queries = full.rotary.apply(plain)
    mask = left_padding(36, pads)
    v = made_of(*(x[:, :, :36] for x in (queries, keys, values)), mask=mask)
    want = attention_over(queries[:, :, 36:], keys[:, :, :36], v.scaling, v.mask).mean(2)
    want = want.view(2, 2, 2, 36).mean(2)
    torch.testing.assert_close(dapq(budget=8, queries=4, kernel=1).score(v), want)
    assert not dapq(budget=8, queries=4).score(made_of(*(x[:, :, :36] for x in (queries, keys, values)))).allclose(want)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt_neox"])
def test_pseudo_queries_are_rotated_as_the_model_would(family, monkeypatch):
    """A model in which all tokens are the same: every layer's next query is its last one, one position on."""
    model, seen = tiny(family), {}
    ids = torch.full((1, 21), 7)

    def reduce(method, v):
        pseudo = v.rotary.following(1, v.mask).apply(v.rotary.last(1).undo(v.queries[:, :, -1:]))
        seen[v.layer] = attention_over(pseudo, v.keys, v.scaling, v.mask)
        return original(method, v)

    original = DapQ.reduce
    monkeypatch.setattr(DapQ, "reduce", reduce)
    with tt.apply("dapq(budget=1.0)", model), torch.no_grad():
        model(ids[:, :20])
    short = dict(seen)

    def after(watcher, query, key, value, mask, scaling):
        everything = torch.ones(1, 20, dtype=torch.bool)
        if watcher.layer in short:
            want = attention_over(query[:, :, -1:], key[:, :, :20], scaling, everything)
            torch.testing.assert_close(short[watcher.layer], want, atol=1e-5, rtol=1e-4)
            checked.append(watcher.layer)

    checked = []
    monkeypatch.setattr(CacheWatcher, "after", after)
    with tt.apply("dapq(budget=1.0)", model), torch.no_grad():
        model(ids)
    assert checked == list(short) and checked


def test_pooling_brings_the_neighbours():
    v = view(n=60)
    plain = v.rotary.undo(v.queries)[:, :, -1:]
    next_query = v.rotary.following(1, v.mask).apply(plain)
    v.keys[:, :, 20] = 6 * (next_query[:, ::2, 0] + next_query[:, 1::2, 0])
    index = dapq(budget=3, queries=1, kernel=3).reduce(v).source[0]
    assert index.tolist() == [[19, 20, 21]] * 2


def test_a_model_without_rotation_is_refused_by_the_name_of_the_layer():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=64)).eval()
    with pytest.raises(tt.ThriftError, match=r"layer 0 .* no rotary"), tt.apply("dapq(budget=8, queries=4)", model):
        model(prompt()["input_ids"])


@pytest.mark.parametrize("wrong", ["budget=0", "queries=0", "kernel=4", "kernel=0", "queries=1.5"])
def test_impossible_parameters_are_refused_in_one_line(wrong):
    with pytest.raises(tt.ThriftError) as error:
        tt.Plan.parse(f"dapq({wrong})")
    assert "\n" not in str(error.value)
