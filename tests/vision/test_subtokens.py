"""Merging the pieces of one identifier: what the method decides from a view."""

import pytest
import torch

from tokenthrift import Plan, ThriftError, View
from tokenthrift.core.view import Lazy
from tokenthrift.models.segments import identifier_groups
from tokenthrift.ops.segments import segment_pool
from tokenthrift.vision.subtokens import Subtokens

SEGMENTS = torch.tensor([[0, 1, 1, 1, 2, 3], [0, 1, 2, 3, 3, 4]])


def view(layer=0, segments=SEGMENTS, **parts):
    def forbidden():
        raise AssertionError("a mean needs no attention")

    batch, tokens = segments.shape
    features = torch.randn(batch, tokens, 4, generator=torch.Generator().manual_seed(0))
    protected = (torch.arange(tokens) < 1).expand(batch, tokens)
    parts = {"attention": Lazy(forbidden)} | parts
    return View(features=features, segments=segments, protected=protected, layer=layer, layers=4, **parts)


def test_the_mean_of_each_identifier():
    v = view()
    map = Subtokens().reduce(v)
    assert map.exclusive and (map.n_in, map.n_out) == (6, 5)
    assert map.mask.tolist() == [[True] * 4 + [False], [True] * 5]
    torch.testing.assert_close(map.apply(v.features), segment_pool(v.features, SEGMENTS))
    assert map.sizes().tolist() == [[1, 3, 1, 1, 0], [1, 1, 1, 2, 1]]
    assert map.positions("anchor")[0, :4].tolist() == [0, 1, 4, 5]
    merged = map.apply(v.features)
    torch.testing.assert_close(map.apply(map.unmerge(merged)), merged)


def test_weights_by_received_attention():
    attention = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)).softmax(-1)
    v = view(attention=lambda rows: attention[:, :, rows])
    map = Subtokens(mode="attention").reduce(v)
    received = attention.mean((1, 2))[0, 1:4]
    torch.testing.assert_close(map.weight[0, 1:4], received / received.sum())
    assert torch.equal(map.sizes(), Subtokens().reduce(view()).sizes())


@pytest.mark.parametrize("method", [Subtokens(), Subtokens(at=2)])
def test_only_in_front_of_its_layer(method):
    assert [method.reduce(view(layer)) is not None for layer in range(4)] == [layer == method.at for layer in range(4)]


def test_nothing_in_pieces_is_left_alone_and_protected_tokens_do_not_join():
    assert Subtokens().reduce(view(segments=torch.arange(5).expand(2, 5))) is None
    assert Subtokens().reduce(view(segments=torch.tensor([[0, 0, 1]]))) is None


def test_a_name_becomes_one_token():
    tokens = ["<s>", "def", "Ġget", "_", "user", "Name", "(", "self", ")", "</s>"]
    map = Subtokens().reduce(view(segments=torch.tensor([identifier_groups(tokens)])))
    assert [[tokens[i] for i, _ in group] for group in map.provenance()[0]] == [
        ["<s>"], ["def"], ["Ġget", "_", "user", "Name"], ["("], ["self"], [")"], ["</s>"],
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", [{"at": -1}, {"at": True}, {"at": 1.5}, {"mode": "learned"}])
def test_bad_parameters_are_refused(wrong):
    with pytest.raises(ThriftError, match="subtokens"):
        Subtokens(**wrong)


def test_plans_print_back_the_same():
    plan = Plan.parse("subtokens(at=3, mode=attention)")
    assert Plan.parse(str(plan)) == plan == Plan.from_yaml(plan.to_yaml())
