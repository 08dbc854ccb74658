"""A growing cache layer is a DynamicLayer in everything but the copying."""

from __future__ import annotations

from copy import deepcopy

import torch
from transformers.cache_utils import DynamicLayer

from tokenthrift.models.growing import GrowingLayer


def both(length=20):
    layers = DynamicLayer(), GrowingLayer()
    feed(layers, length)
    return layers


def feed(layers, count, seed=0, batch=2):
    new = torch.randn(2, batch, 3, count, 4, generator=torch.Generator().manual_seed(seed))
    for layer in layers:
        keys, values = layer.update(*new)
        assert keys is layer.keys
        assert values is layer.values


def same(layers):
    assert torch.equal(layers[0].keys, layers[1].keys)
    assert torch.equal(layers[0].values, layers[1].values)
    assert layers[0].get_seq_length() == layers[1].get_seq_length()
    assert layers[0].get_mask_sizes(3) == layers[1].get_mask_sizes(3)


def test_whatever_happens_to_both_they_hold_the_same():
    layers = both()
    same(layers)
    for step, change in enumerate(
        (
            lambda layer: None,
            lambda layer: layer.crop(-5),
            lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
            lambda layer: layer.batch_select_indices(torch.tensor([1, 1])),
            lambda layer: layer.reset(),
        )
    ):
        for layer in layers:
            change(layer)
        feed(layers, 3, seed=step)
        feed(layers, 1, seed=10 + step)
        same(layers)
    for layer in layers:
        layer.batch_repeat_interleave(2)
    feed(layers, 2, batch=4)
    same(layers)


def test_it_takes_over_a_layer_and_then_appends_in_place():
    plain, _ = both()
    layers = plain, GrowingLayer(plain)
    feed(layers, 1)
    place = layers[1].keys.data_ptr()
    feed(layers, 60, seed=1)
    same(layers)
    assert layers[1].keys.data_ptr() == place


def test_a_copy_goes_its_own_way():
    layer = both()[1]
    copy = deepcopy(layer)
    feed([layer], 2, seed=1)
    feed([copy], 2, seed=2)
    assert torch.equal(layer.keys[:, :, :20], copy.keys[:, :, :20])
    assert not torch.equal(layer.keys[:, :, 20:], copy.keys[:, :, 20:])


def test_what_is_remembered_goes_when_entries_do():
    for change in (
        lambda layer: layer.crop(-1),
        lambda layer: layer.reset(),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.batch_repeat_interleave(2),
    ):
        layer = both()[1]
        layer.memory["pages"] = 1
        change(layer)
        assert not layer.memory


def test_gradients_flow():
    layer = GrowingLayer()
    keys = torch.randn(1, 1, 3, 4, requires_grad=True)
    layer.update(keys, keys)
    out = layer.update(keys, keys)[0]
    out.sum().backward()
    assert torch.equal(keys.grad, torch.full_like(keys, 2))
