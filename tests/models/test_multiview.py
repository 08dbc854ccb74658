"""Multi-view transformers: merging inside the attention across views is exactly that, and leaves no trace."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tokenthrift as tt
from models.multiviews import Block, MultiView
from tokenthrift.models.adapters import adapter_for
from tokenthrift.models.multiview import MultiViewAdapter
from tokenthrift.vision.fastvggt import FastVGGT

close = {"rtol": 1e-4, "atol": 1e-5}


def build(**sizes):
    torch.manual_seed(0)
    model = MultiView(**sizes).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    return model


def images(batch=1, views=3, height=16, width=24, seed=1):
    return torch.randn(batch, views, 3, height, width, generator=torch.Generator().manual_seed(seed))


def merged_by_hand(model, x, method):
    """The model written out, with the dense matrices of the maps around the attention of the global blocks."""
    aggregator, maps = model.aggregator, {}
    grid = (x.shape[1], x.shape[-2] // 4, x.shape[-1] // 4)
    h, pos = aggregator.embed(x)
    batch, views, tokens, _ = h.shape
    for i, (frame, block) in enumerate(zip(aggregator.frame_blocks, aggregator.global_blocks, strict=True)):
        h = frame(h.flatten(0, 1), pos=pos).reshape(batch, views * tokens, -1)
        normed = block.norm1(h)
        q, k, v = block.attn.project(normed, pos.repeat(views, 1))
        view = tt.View(features=normed, prefix=3, grid=grid, layer=i, layers=2)
        w, u = torch.eye(h.shape[1]), torch.eye(h.shape[1])
        map = method.reduce(view)
        if map is not None:
            maps[i], w = map, map.dense().unsqueeze(1)
            u = map.unmerge(torch.eye(map.n_out).expand(batch, -1, -1)).unsqueeze(1)
        q, k, v = (w @ t for t in (q, k, v))
        mixed = u @ ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v)
        h = h + block.attn.proj(mixed.transpose(1, 2).flatten(2))
        h = (h + block.mlp(block.norm2(h))).view(batch, views, tokens, -1)
    return model.head(h[:, :, 3:]), maps


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("method", [FastVGGT(), FastVGGT(protect=0.0, ratio=0.3), FastVGGT(start=1, sx=3)])
def test_equals_the_reduction_written_out(batch, method):
    model, x = build(), images(batch)
    expected, maps = merged_by_hand(model, x, method)
    dense = model(x)
    with tt.apply(tt.Plan(vision=method), model) as session:
        out = model(x)
    torch.testing.assert_close(out, expected, **close)
    assert (out - dense).abs().max() > 1e-3 and out.shape == dense.shape
    found = session.provenance()["vision"]
    assert found.keys() == maps.keys()
    for i, map in maps.items():
        assert torch.equal(found[i].dense(), map.dense())
    report = session.report()
    assert report.forwards == 1 and report.flops < report.flops_dense
    n = 3 * (3 + 24)
    assert report.stages["vision"].tokens_before == batch * n * 2
    assert report.stages["vision"].tokens_after == batch * sum(maps[i].n_out if i in maps else n for i in range(2))


@pytest.mark.parametrize("plan", ["vision=fastvggt(ratio=0.0)", "vision=fastvggt(start=2)", None])
def test_nothing_to_merge_is_bit_identical(plan):
    model, x = build(), images()
    dense = model(x)
    with tt.apply(plan, model) as session:
        assert torch.equal(model(x), dense)
    if plan:
        assert session.report().flops == session.report().flops_dense
        assert session.report().stages["vision"].kept == 1


def test_a_single_view_has_nothing_to_merge():
    model, x = build(), images(views=1)
    dense = model(x)
    with tt.apply("vision=fastvggt", model):
        assert torch.equal(model(x), dense)


def test_views_of_one_scene_and_of_another_size_in_turn():
    model = build()
    with tt.apply("vision=fastvggt", model) as session:
        for x in (images(views=4), images(views=2, height=8), images()[0]):
            expected, _ = merged_by_hand(model, x if x.dim() == 5 else x[None], FastVGGT())
            torch.testing.assert_close(model(x), expected, **close)
    assert session.report().forwards == 3


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


BLOCKS = "aggregator.global_blocks"


@pytest.mark.parametrize("where", ["aggregator", f"{BLOCKS}.0.attn", f"{BLOCKS}.0.attn.proj", f"{BLOCKS}.1.mlp"])
def test_a_failing_forward_leaves_no_trace(where):
    model, x = build(), images()
    dense = model(x)
    expected, _ = merged_by_hand(model, x, FastVGGT())

    def fail(*_):
        raise RuntimeError("on purpose")

    with tt.apply("vision=fastvggt", model) as session:
        handle = model.get_submodule(where).register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(x)
        handle.remove()
        assert session.report().forwards == int(where == "aggregator")
        torch.testing.assert_close(model(x), expected, **close)  # the next forward is not affected
    assert hooks(model) == 0
    assert torch.equal(model(x), dense)
    assert torch._C._len_torch_function_stack() == 0  # nothing stands before torch's functions any more


def test_an_exception_in_the_session_restores_the_model():
    model, x = build(), images()
    dense = model(x)
    with pytest.raises(KeyError), tt.apply("vision=fastvggt", model):
        model(x)
        raise KeyError
    assert hooks(model) == 0 and torch.equal(model(x), dense)


def test_gradient_checkpointing_computes_the_same_merge_again():
    model, x = build().requires_grad_(True), images()

    def gradient(forward):
        model.zero_grad()
        for block in model.aggregator.global_blocks:
            block.forward = lambda x, pos, block=block: forward(block, x, pos)
        with tt.apply("vision=fastvggt", model) as session:
            model(x).square().sum().backward()
        for block in model.aggregator.global_blocks:
            del block.forward
        assert session.report().forwards == 1
        return model.aggregator.global_blocks[0].attn.qkv.weight.grad.clone()

    plain = gradient(Block.forward)
    again = gradient(lambda block, x, pos: checkpoint(Block.forward, block, x, pos, use_reentrant=False))
    torch.testing.assert_close(again, plain)


def test_the_adapter_goes_before_that_of_encoders():
    model = build()
    assert isinstance(adapter_for(model), MultiViewAdapter)
    assert isinstance(adapter_for(model.aggregator), MultiViewAdapter)
    assert not MultiViewAdapter.fits(torch.nn.Linear(2, 2))
    with pytest.raises(tt.ThriftError, match="no frame_blocks"):
        MultiViewAdapter(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("plan", ["vision=tome(keep=0.5)", "vision=tomesd"])
def test_methods_that_act_elsewhere_are_refused(plan):
    model = build()
    with pytest.raises(tt.ThriftError, match="write vision=fastvggt"), tt.apply(plan, model):
        pass
    assert hooks(model) == 0


def test_attention_that_cannot_be_reached_is_said():
    model = build()
    for block in model.aggregator.global_blocks:
        block.attn.fused_attn = False
    with tt.apply("vision=fastvggt", model), pytest.raises(tt.ThriftError, match="fused_attn=True"):
        model(images())


def test_images_without_views_are_refused():
    model = build()
    with tt.apply("vision=fastvggt", model), pytest.raises(tt.ThriftError, match="batch, views, 3"):
        model.aggregator(images()[0])
