"""DiffRate as a method: one step of the authors' code, and where its numbers come from."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenthrift import Plan, ThriftError, View
from tokenthrift.core.view import Lazy
from tokenthrift.vision.diffrate import DiffRate

GOLDEN = Path(__file__).parents[1] / "golden" / "vision" / "diffrate_step.npz"
close = {"rtol": 1e-5, "atol": 1e-6}


def view(x, attention, prefix=1, layer=1, layers=4, grid=(1, 4, 4), tokens=None):
    return View(
        features=x,
        attention=lambda rows: attention[:, :, rows],
        protected=(torch.arange(x.shape[1]) < prefix).expand(x.shape[:2]),
        prefix=prefix,
        grid=grid,
        tokens=tokens or prefix + grid[1] * grid[2],
        layer=layer,
        layers=layers,
    )


def some(tokens=17, batch=2, seed=0):
    torch.manual_seed(seed)
    return torch.randn(batch, tokens, 6), torch.randn(batch, 2, tokens, tokens).softmax(-1)


def test_equals_one_step_of_the_official_code():
    g = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN).items()}
    prune, merge, order = int(g["prune_kept"]), int(g["merge_kept"]), g["order"]
    method = DiffRate(prune=[prune] * 4, merge=[merge] * 4)
    map = method.reduce(view(g["x"], g["attn"]))

    def by_importance(x):  # the authors sort all tokens by importance; we keep their order
        kept = order[:, :merge]
        place = kept.argsort(-1).argsort(-1)
        return x.gather(1, place.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    assert torch.equal(map.anchors, order[:, :merge].sort(-1).values)
    torch.testing.assert_close(by_importance(map.apply(g["x"])), g["out"], **close)
    torch.testing.assert_close(by_importance(map.sizes(g["size"].squeeze(-1)).unsqueeze(-1)), g["out_size"], **close)
    torch.testing.assert_close(by_importance((map.dense() > 0).float()), g["out_source"], rtol=0, atol=0)
    merged = map.share.gather(1, order[:, merge:prune])
    torch.testing.assert_close(merged, g["node_max"], **close)
    # The authors give a pruned token the class token's features, we give it zeros.
    kept = map.kept.unsqueeze(-1)
    back = map.unmerge(map.apply(g["x"]))
    torch.testing.assert_close(back * kept, g["uncompressed"] * kept, **close)
    assert (map.kept.sum(-1) == prune).all() and not (back * ~kept).any()


def test_pruning_alone_and_merging_alone():
    x, attention = some()
    pruned = DiffRate(prune=[17, 9, 9, 9]).reduce(view(x, attention))
    assert pruned.is_selection and pruned.n_out == 9 and torch.equal(pruned.sizes(), torch.ones(2, 9))
    best = attention[:, :, 0, 1:].mean(1).topk(8).indices.sort(-1).values + 1
    assert torch.equal(pruned.source[:, 1:], best)
    merged = DiffRate(merge=[17, 9, 9, 9]).reduce(view(x, attention))
    assert merged.n_out == 9 and merged.kept.all() and torch.equal(merged.anchors, pruned.source)
    torch.testing.assert_close(merged.dense().sum(-1), torch.ones(2, 9))
    torch.testing.assert_close(merged.apply(merged.unmerge(merged.apply(x))), merged.apply(x), **close)
    assert torch.equal(merged.apply(x)[:, 0], x[:, 0])


def test_sizes_stay_positive_when_nothing_is_alike():
    x = torch.tensor([[[1.0, 0], [0, 1], [0, 2], [0, -1], [0, -2], [0, -3]]])
    attention = torch.tensor([6.0, 5, 4, 3, 2, 1]).softmax(-1).expand(1, 1, 6, 6)
    map = DiffRate(merge=[3]).reduce(view(x, attention, layer=0, layers=1, grid=(1, 1, 5)))
    assert (map.sizes() >= 1).all() and (map.share > 0).all()
    twice = map.then(DiffRate(merge=[2]).reduce(view(map.apply(x), attention[..., :3, :3], layer=0, layers=1)))
    assert twice.kept.all()  # provenance remembers also what adds next to nothing


def test_without_a_class_token_the_attention_received_decides():
    x, attention = some(16)
    map = DiffRate(prune=[16, 7, 7, 7]).reduce(view(x, attention, prefix=0))
    assert torch.equal(map.source, attention.mean((1, 2)).topk(7).indices.sort(-1).values)


def test_protected_tokens_stay_even_if_the_numbers_say_otherwise():
    x, attention = some()
    seen = view(x, attention)
    protected = torch.zeros(2, 17, dtype=torch.bool)
    protected[:, [0, 5, 16]] = True
    seen.offer("protected", protected)
    map = DiffRate(prune=[9, 2, 2, 2], merge=[9, 1, 1, 1]).reduce(seen)
    assert map.n_out == 4 and map.kept[:, [0, 5, 16]].all()
    merged = DiffRate(merge=[1] * 4).reduce(seen)
    assert merged.n_out == 4 and torch.equal(merged.sizes().gather(1, merged.owner)[protected], torch.ones(6))


def test_registers_stay_first_and_receive_nothing():
    x, attention = some(21)
    map = DiffRate(prune=[21, 15, 9, 9], merge=[21, 10, 9, 9]).reduce(view(x, attention, prefix=5))
    assert torch.equal(map.apply(x)[:, :5], x[:, :5])
    assert torch.equal(map.sizes()[:, :5], torch.ones(2, 5))


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_keep_is_met_after_the_last_layer_half_by_pruning(keep):
    tokens, pruned = 37, 0
    for layer in range(6):
        map = DiffRate(keep=keep).reduce(view(*some(tokens), layer=layer, layers=6, grid=(1, 6, 6)))
        assert layer or map is None
        if map is not None:
            pruned += int((~map.kept[0]).sum())
            tokens = map.n_out
    assert tokens == round(36 * keep) + 1
    assert abs(pruned - (37 - tokens) / 2) <= 3


@pytest.mark.parametrize(("method", "layer"), [(DiffRate(keep=1.0), 3), (DiffRate(), 0), (DiffRate(merge=[99] * 4), 2)])
def test_a_layer_without_reduction_computes_nothing(method, layer):
    seen = view(*some(), layer=layer)
    seen.offer("attention", Lazy(lambda: pytest.fail("not needed")))
    assert method.reduce(seen) is None


def test_only_the_row_of_the_class_token_is_asked_for():
    x, attention = some()
    asked = []
    seen = view(x, attention)
    seen.offer("attention", lambda rows: asked.append(rows) or attention[:, :, rows])
    DiffRate().reduce(seen)
    assert asked == [slice(0, 1)]


def test_a_schedule_file_is_the_same_as_its_lists(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"model": "tiny", "tokens": 17, "prune": [17, 12], "merge": [17, 9], "flops": 0.7}))
    from_file, from_lists = DiffRate(schedule=str(path)), DiffRate(prune=[17, 12], merge=[17, 9])
    a, b = (m.reduce(view(*some(), layers=2)) for m in (from_file, from_lists))
    assert torch.equal(a.dense(), b.dense()) and a.n_out == 9
    larger = from_file.reduce(view(*some(65), layers=2, grid=(1, 8, 8)))  # four times as many patches
    assert larger.n_out == 1 + 4 * 8 and int(larger.kept[0].sum()) == 1 + 4 * 11
    plan = Plan(vision=from_file)
    assert Plan.parse(str(plan)) == plan


def test_a_schedule_for_another_number_of_layers_is_refused(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"prune": [17, 12], "merge": [17, 9]}))
    with pytest.raises(ThriftError, match="numbers for 2 layers, the model has 4"):
        DiffRate(schedule=str(path)).reduce(view(*some()))
    with pytest.raises(ThriftError, match="numbers for 1 layers, the model has 4"):
        DiffRate(prune=[9]).reduce(view(*some()))


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "{}",
        '{"prune": [4], "merge": [4, 3]}',
        '{"prune": [0], "merge": [0]}',
        '{"prune": [4], "merge": [4], "tokens": "5"}',
    ],
)
def test_files_that_are_no_schedule_are_refused(tmp_path, text):
    path = tmp_path / "rates.json"
    path.write_text(text)
    with pytest.raises(ThriftError, match="must name the tokens kept"):
        DiffRate(schedule=str(path))


@pytest.mark.parametrize(
    ("wrong", "say"),
    [
        ({"keep": 0}, "not a share"),
        ({"keep": 0.3, "prune": [4]}, "takes one of"),
        ({"schedule": "a.json", "merge": [4]}, "takes one of"),
        ({"schedule": "/nowhere/a.json"}, "cannot be read"),
        ({"prune": [4, 2], "merge": [4]}, "must name the tokens kept"),
        ({"prune": [4.5]}, "must name the tokens kept"),
        ({"merge": []}, "must name the tokens kept"),
    ],
)
def test_bad_parameters_say_what_to_write(wrong, say):
    with pytest.raises(ThriftError, match=say):
        DiffRate(**wrong)


@pytest.mark.parametrize("call", ["diffrate()", "diffrate(keep=0.3)", "diffrate(prune=[9, 8], merge=[9, 7])"])
def test_plans_print_back_the_same(call):
    plan = Plan.parse(f"vision={call}")
    assert Plan.parse(str(plan)) == plan == Plan.from_yaml(plan.to_yaml())


def test_a_file_nested_too_deep_and_numbers_that_are_no_list(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ThriftError, match="it holds no JSON"):
        DiffRate(schedule=str(path))
    with pytest.raises(ThriftError, match="kept in every layer"):
        DiffRate(prune=torch.tensor([1.0, 2.0]))
