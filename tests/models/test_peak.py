"""How much exists at once while a prompt is read: entries of all layers, and the largest tensor of any operation."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache

import tokenthrift as tt
from cache_plans import METHODS
from cache_plans import plan as plan_of
from tiny_models import prompt, tiny
from tokenthrift.models.kv import RaggedLayer, ReducedLayer

LAYERS, HEADS, KV_HEADS, DIM = 4, 6, 2, 8
LENGTH, CHUNK, BUDGET, EVERY = 400, 16, 20, 8
REPEATED = [info.name for info in tt.methods(stage="cache") if "every" in info.defaults]


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.fixture
def held(monkeypatch):
    """Whenever a layer's attention begins: which it is, and the entries a row and head that each layer holds then."""
    seen, update = [], DynamicCache.update

    def noted(self, keys, values, layer, *args, **kwargs):
        out = update(self, keys, values, layer, *args, **kwargs)
        entries = [
            x.entries / (len(keys) * KV_HEADS) if isinstance(x, ReducedLayer) else x.get_seq_length()
            for x in self.layers
        ]
        seen.append((layer, entries))
        return out

    monkeypatch.setattr(DynamicCache, "update", noted)
    return seen


def read(plan, chunk, pad=0, length=LENGTH):
    """Read the prompt; returns the largest tensor."""
    model, inputs = tiny("llama", num_hidden_layers=LAYERS), prompt(length=length, pad=pad)
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    with tt.apply(plan, model), Largest() as largest:
        model.generate(**inputs, max_new_tokens=1, do_sample=False, **options)
    return largest.numel


@pytest.mark.parametrize("name", REPEATED)
@pytest.mark.parametrize("pad", [0, 37])
def test_a_prompt_in_chunks_never_holds_more_than_budget_and_chunk(name, pad, held):
    more = ", recent=16" if name == "expected_attention" else ""
    largest = read(plan_of(name, BUDGET)[:-1] + f"{more}, every={EVERY})", CHUNK, pad)
    assert len(held) == LAYERS * LENGTH // CHUNK
    for layer, entries in held:
        others = entries[:layer] + entries[layer + 1 :]
        if name != "pyramid_kv":  # whose layers have budgets of their own, which move as the text grows
            assert entries[layer] <= BUDGET + CHUNK and all(e <= BUDGET for e in others)
        if name != "pyramid_kv" or layer == 0:
            assert sum(entries) <= LAYERS * BUDGET + CHUNK
    assert max(max(entries) for _, entries in held) > BUDGET  # while its chunk is there
    wide = 2 * BUDGET if name in ("pyramid_kv", "ada_kv") else BUDGET
    operand = 2 * HEADS * (wide + CHUNK) * max(CHUNK, DIM)  # logits of a chunk over what is there
    assert largest <= operand < 2 * KV_HEADS * LENGTH * DIM  # and that is less than one full layer


def test_chunks_smaller_than_every_wait_for_it(held):
    read(f"knorm(budget={BUDGET}, every=30)", 8)
    peak = max(max(entries) for _, entries in held)
    assert BUDGET + 30 <= peak <= BUDGET + 30 - 1 + 8


def test_without_every_later_chunks_are_all_kept(held):
    read("knorm(budget=10)", CHUNK)
    assert held[-1][1] == [10 + LENGTH - CHUNK] * LAYERS


@pytest.mark.parametrize(
    "plan", ["knorm(budget=20)", "snapkv(budget=20, window=4, every=8)", "ada_kv(base=knorm, budget=20)"]
)
def test_a_prompt_in_one_pass_holds_one_full_layer_beside_the_reduced_ones(plan, held):
    largest = read(plan, None)
    assert held == [(i, [BUDGET] * i + [LENGTH] + [0] * (LAYERS - 1 - i)) for i in range(LAYERS)]
    # The largest are a layer's hidden states and keys for all its query heads: nothing is quadratic in the length.
    assert largest <= 2 * LENGTH * 64


def test_attention_of_all_queries_is_summed_block_by_block():
    assert read("h2o(budget=20)", None, length=512 - 1) <= 2 * HEADS * 128 * 511


@pytest.fixture
def no_cycles():
    """What only the garbage collector would free is not free."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "speckv"])  # its drafts have a cache of their own
def test_what_a_layer_drops_is_free_before_the_next_layer_runs(name, monkeypatch, no_cycles):
    """Keys and values of the whole prompt, in one layer at a time."""
    alive, update = [], DynamicCache.update

    def noted(self, keys, values, layer, *args, **kwargs):
        assert not [at for at, ref in alive if at != layer and ref() is not None]
        out = update(self, keys, values, layer, *args, **kwargs)
        alive.extend((layer, weakref.ref(t)) for t in (keys, values, *out))
        return out

    monkeypatch.setattr(DynamicCache, "update", noted)
    model, inputs = tiny("llama", num_hidden_layers=LAYERS), prompt(length=60, pad=5)
    with tt.apply(plan_of(name, BUDGET), model), torch.no_grad():
        model(**inputs)
    assert len({at for at, _ in alive}) == LAYERS


@pytest.mark.parametrize("base", ["knorm", "keydiff", "'snapkv(window=4)'"])
def test_ragged_heads_are_padded_for_one_layer_at_a_time(base, monkeypatch, no_cycles):
    alive, dense = [], RaggedLayer._dense

    def noted(self, name):
        assert not [layer for layer, ref in alive if layer is not self and ref() is not None]
        out = dense(self, name)
        if out is not None:
            alive.append((self, weakref.ref(out)))
        return out

    monkeypatch.setattr(RaggedLayer, "_dense", noted)
    read(f"ada_kv(base={base}, budget=20, every=8)", CHUNK)
    assert len({id(layer) for layer, _ in alive}) == LAYERS and all(ref() is None for _, ref in alive)
