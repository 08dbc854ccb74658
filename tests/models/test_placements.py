"""Where a method may act: between attention and MLP, at a layer's boundary, around a sub-layer; and in what state."""

from typing import ClassVar

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tokenthrift as tt
from models.encoders import TimmLike, spread, text_encoder, texts
from tokenthrift.core.tokenmap import TokenMap
from tokenthrift.ops.attention import fuse_attention
from tokenthrift.ops.matching import bipartite_soft_matching

TINY = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 40, "patch_size": 8}
close = {"rtol": 1e-5, "atol": 1e-5}
NEEDS = ("features", "keys", "attention", "sizes", "protected", "prefix", "grid", "tokens", "layer")


@pytest.fixture(autouse=True)
def _quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def dinov2(attention="sdpa"):
    torch.manual_seed(0)
    return spread(Dinov2Model(Dinov2Config(**TINY, layerscale_value=0.7)).eval(), attention)


def pixels(batch=2, seed=1):
    return torch.randn(batch, 3, 40, 40, generator=torch.Generator().manual_seed(seed))


def features(model, x):
    return model(x).last_hidden_state


def dense_map(view, n_out=9):
    """A soft assignment of all tokens to ``n_out``, CLS on its own."""
    n = view.features.shape[1]
    share = torch.rand(view.features.shape[0], n_out, n, generator=torch.Generator().manual_seed(n))
    share[:, 0], share[:, :, 0] = 0, 0
    share[:, 0, 0] = 1
    return TokenMap.transform(share / share.sum(1, keepdim=True), view.sizes)


@tt.method("_soft", stage="vision", paper="(a test)", needs=NEEDS)
class Soft:
    placement: ClassVar[str] = "boundary"
    prop_attn: bool = True
    fused_attention: bool = False
    at: int = 1

    def reduce(self, view):
        return dense_map(view) if view.layer == self.at else None


@tt.method("_matched", stage="vision", paper="(a test)", needs=NEEDS)
class Matched:
    """ToMe's matching on the hidden state, anywhere."""

    placement: str = "boundary"
    on: tuple = ()
    prop_attn: bool = False
    fused_attention: bool = False
    r: int = 4

    def reduce(self, view):
        groups = bipartite_soft_matching(view.features, self.r, view.protected)
        return None if groups is None or self.r == 0 else groups.map(view.sizes)


def blocks(model, h, between):
    """DINOv2's layers written out; ``between(i, h, attend, layer)`` runs attention with its residual."""
    for i, layer in enumerate(model.encoder.layer):
        h = between(i, h, layer)
        h = h + layer.layer_scale2(layer.mlp(layer.norm2(h)))
    return model.layernorm(h)


def qkv(layer, h):
    a = layer.attention
    return [getattr(a, f"{p}_proj")(layer.norm1(h)).unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for p in "qkv"]


def mix(layer, weights, v):
    return layer.layer_scale1(layer.attention.o_proj((weights @ v).transpose(1, 2).flatten(2)))


def softmax(q, k, sizes=None):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores if sizes is None else scores + sizes.log()[:, None, None]).softmax(-1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", [Soft, Matched])
def test_boundary(method, fused, attention):
    model, x = dinov2(attention), pixels()
    method = method(fused_attention=fused, prop_attn=True)
    sizes, maps = torch.ones(2, 26), []

    def between(i, h, layer):
        nonlocal sizes
        view = tt.View(features=h, sizes=sizes, protected=(torch.arange(h.shape[1]) < 1).expand(h.shape[:2]), layer=i)
        q, k, _ = qkv(layer, h)
        before = softmax(q, k, sizes)
        map = method.reduce(view)
        if map is not None:
            h, sizes = map.apply(h), map.sizes(sizes)
            maps.append(map)
        q, k, v = qkv(layer, h)
        weights = softmax(q, k, sizes)
        if fused and map is not None:
            weights = map.dense()[:, None] @ before @ map.dense_share()[:, None].transpose(-1, -2)
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), **close)
            torch.testing.assert_close(fuse_attention(before, map), weights, **close)
        return h + mix(layer, weights, v)

    expected = blocks(model, model.embeddings(x), between)
    with tt.apply(tt.Plan(vision=method), model) as session:
        torch.testing.assert_close(features(model, x), expected, **close)
    assert session.provenance()["vision"].n_out == expected.shape[1] == maps[-1].n_out < 26
    assert session.report().flops < session.report().flops_dense
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("on", [("attention",), ("mlp",), ("attention", "mlp"), ("kernel",)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_around(on, attention):
    model, x = dinov2(attention), pixels()
    method = Matched(placement="around", on=on)
    expected = model.embeddings(x)
    for layer in model.encoder.layer:
        h = expected
        view = tt.View(features=h, sizes=torch.ones(2, 26), protected=(torch.arange(26) < 1).expand(2, 26), layer=0)
        map = method.reduce(view)
        if "attention" in on:
            y = layer.attention(map.apply(layer.norm1(h)))[0]
            h = h + layer.layer_scale1(map.unmerge(y))
        elif "kernel" in on:
            q, k, v = (
                map.apply(t.transpose(1, 2).flatten(2)).unflatten(-1, (2, 12)).transpose(1, 2) for t in qkv(layer, h)
            )
            y = (softmax(q, k) @ v).transpose(1, 2).flatten(2)
            h = h + layer.layer_scale1(layer.attention.o_proj(map.unmerge(y)))
        else:
            h = h + layer.layer_scale1(layer.attention(layer.norm1(h))[0])
        y = layer.norm2(h)
        y = map.unmerge(layer.mlp(map.apply(y))) if "mlp" in on else layer.mlp(y)
        expected = h + layer.layer_scale2(y)
    with tt.apply(tt.Plan(vision=method), model) as session:
        out = features(model, x)
    assert out.shape == (2, 26, 24)
    torch.testing.assert_close(out, model.layernorm(expected), **close)
    report = session.report()
    assert report.flops < report.flops_dense and report.stages["vision"].kept == 22 / 26
    assert [map.n_out for map in session.provenance()["vision"].values()] == [22] * 3


@pytest.mark.parametrize("placement", ["between", "boundary", "around"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_nothing_to_reduce_is_bit_identical_everywhere(placement, attention):
    on = ("attention", "mlp", "kernel") if placement == "around" else ()
    for fused in (False, True):
        method = Matched(placement=placement, on=on, r=0, fused_attention=fused and not on, prop_attn=True)
        model = dinov2(attention)
        dense = features(model, pixels())
        with tt.apply(tt.Plan(vision=method), model):
            assert torch.equal(features(model, pixels()), dense)
        assert torch.equal(features(model, pixels()), dense)


@pytest.mark.parametrize("placement", ["boundary", "around"])
def test_padded_texts_are_reduced_as_if_alone(placement):
    method = Matched(placement=placement, on=("attention",) if placement == "around" else (), prop_attn=True)
    for name in ("bert", "clip-text"):
        for fused in (False, True):
            if fused and placement == "boundary":
                method = Matched(fused_attention=True, prop_attn=True)
            model, batch = text_encoder(name), texts(21, 12)
            with tt.apply(tt.Plan(vision=method), model):
                both = model(**batch).last_hidden_state
                for i, n in enumerate((21, 12)):
                    alone = model(**{k: v[i : i + 1, :n] for k, v in batch.items()}).last_hidden_state
                    torch.testing.assert_close(both[i, :n], alone[0], **close)


# ---- merging in a method's own way -----------------------------------------------------------------------------------


@tt.method("_scaled", stage="vision", paper="(a test)", needs=("features", "protected", "sizes"))
class Scaled:
    """Merged features are twice the average."""

    factor: float = 2.0

    def reduce(self, view):
        return bipartite_soft_matching(view.features, 3, view.protected).map(view.sizes)

    def combine(self, view, map):
        return self.factor * map.apply(view.features)


def test_combine_replaces_the_average():
    model, x = dinov2(), pixels()

    def between(i, h, layer):
        q, k, v = qkv(layer, h)
        h = h + mix(layer, softmax(q, k), v)
        n = h.shape[1]
        protected = (torch.arange(n) < 1).expand(2, n)
        view = tt.View(features=h, protected=protected, sizes=sizes[-1])
        map = Scaled().reduce(view)
        sizes.append(map.sizes(sizes[-1]))
        return 2 * map.apply(h)

    sizes = [torch.ones(2, 26)]
    expected = blocks(model, model.embeddings(x), between)
    with tt.apply(tt.Plan(vision=Scaled()), model):
        torch.testing.assert_close(features(model, x), expected, **close)
    with tt.apply(tt.Plan(vision=Scaled()), text_encoder("bert")) as session:
        padded = session.adapter.model(**texts(21, 12)).last_hidden_state
        alone = session.adapter.model(**{k: v[1:, :12] for k, v in texts(21, 12).items()}).last_hidden_state
    torch.testing.assert_close(padded[1, :12], alone[0], **close)


# ---- frames ----------------------------------------------------------------------------------------------------------


@tt.method("_joined", stage="vision", paper="(a test)", needs=("features", "prefix", "grid", "layer", "protected"))
class Joined:
    """Two frames become one row before layer 1: the mean of their CLS tokens, then every other patch."""

    placement: ClassVar[str] = "boundary"

    def join(self, layer):
        return 2 if layer == 1 else 1

    def reduce(self, view):
        if view.layer != 1:
            return None
        frames, h, w = view.grid
        assert view.protected.sum(-1).tolist() == [frames] * view.features.shape[0]
        frame = torch.arange(frames * (1 + h * w)) % (1 + h * w)
        group = torch.where(frame == 0, 0, torch.where(frame % 2 == 0, 0, -1))
        kept = (frame > 0) & (frame % 2 == 0)
        group = torch.where(kept, kept.cumsum(0), torch.where(frame == 0, 0, -1))
        return TokenMap.merge(group.expand(view.features.shape[0], -1))


def test_frames_join_into_one_sequence():
    torch.manual_seed(0)
    model = spread(CLIPVisionModel(CLIPVisionConfig(**TINY, intermediate_size=48)).eval())
    x = pixels(4)
    with tt.apply(tt.Plan(vision=Joined()), model) as session:
        out = model(x)
        assert out.last_hidden_state.shape == (2, 1 + 24, 24) and out.pooler_output.shape == (2, 24)
        one = model(x[2:])
        torch.testing.assert_close(one.last_hidden_state, out.last_hidden_state[1:], **close)
        with pytest.raises(tt.ThriftError, match="joins 2 frames"):
            model(x[:3])
    map = session.provenance()["vision"]
    assert map.n_in == 52 and map.n_out == 25
    report = session.report()
    assert report.flops < report.flops_dense


# ---- other attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("method", ["tome(r=4)", Matched(prop_attn=True, fused_attention=True), "tome(r=0)"], ids=str)
def test_timm_s_models(method, qk_norm):
    torch.manual_seed(0)
    model, x = spread(TimmLike(qk_norm=qk_norm).eval()), pixels()
    dense, plan = model(x), tt.Plan.of(method) if isinstance(method, str) else tt.Plan(vision=method)
    with tt.apply(plan, model) as session:
        out, tokens = model(x), model.forward_features(x)
    assert tokens.shape == (2, 26, 24)
    torch.testing.assert_close(model.head(tokens[:, 1:].mean(1)), out)
    assert torch.equal(out, dense) == (method == "tome(r=0)")
    assert session.provenance()["vision"].n_out == (26 if method == "tome(r=0)" else 14)
    assert torch.equal(model(x), dense)


def test_flash_kernels_get_the_sizes_as_one_more_channel(monkeypatch):
    seen = []

    def flash(module, query, key, value, attention_mask, scaling=None, **kwargs):
        assert attention_mask is None
        seen.append(query.shape[-1])
        return functional.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", lambda *a, **k: None)
    model = dinov2()
    with tt.apply("vision=tome(r=4)", model):
        expected = features(model, pixels())
    model.config._attn_implementation_internal = "flash_attention_2"
    dense = features(model, pixels())
    with tt.apply("vision=tome(r=4)", model):
        torch.testing.assert_close(features(model, pixels()), expected, **close)
    assert seen[-3:] == [12, 16, 16]  # the first layer has no sizes yet; 12 + 1 is filled up to a multiple of 8
    assert torch.equal(features(model, pixels()), dense)
    with pytest.raises(tt.ThriftError, match="takes no mask"), tt.apply(tt.Plan(vision=Ragged()), model):
        features(model, pixels())


@tt.method("_ragged", stage="vision", paper="(a test)", needs=("features",))
class Ragged:
    def reduce(self, view):
        keep = torch.ones(view.features.shape[:2], dtype=torch.bool)
        keep[0, 5:9] = False
        return TokenMap.keep(keep) if view.layer == 0 else None


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["tome(r=4)", Matched(fused_attention=True, prop_attn=True), Scaled()], ids=str)
def test_gradient_checkpointing(plan):
    plan = tt.Plan.of(plan) if isinstance(plan, str) else tt.Plan(vision=plan)

    def gradients(checkpointing):
        model = dinov2().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with tt.apply(plan, model) as session, torch.enable_grad():
            loss = features(model, pixels()).square().sum()
            loss.backward()
            assert session.report().forwards == 1
            torch.testing.assert_close(features(model, pixels()).square().sum(), loss, **close)
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys() and len(plain) > 20
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-4, atol=1e-4)


def test_checkpointing_of_the_whole_encoder():
    model = dinov2()
    with tt.apply("vision=tome(r=4)", model), torch.enable_grad():
        x = pixels().requires_grad_()
        features(model, x).square().sum().backward()
        plain, x.grad = x.grad, None
        checkpoint(lambda x: features(model, x), x, use_reentrant=False).square().sum().backward()
        torch.testing.assert_close(x.grad, plain, **close)


def test_a_layer_that_is_there_twice():
    model = dinov2()
    model.encoder.layer[2] = model.encoder.layer[1]
    with tt.apply("vision=tome(r=4)", model) as session:
        assert features(model, pixels()).shape[1] == 26 - 12
    assert session.report().flops < session.report().flops_dense
