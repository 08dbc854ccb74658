"""Vision encoders: reductions are exactly the merged block, leave no trace, and change nothing when told to."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import tokenthrift as tt
from tokenthrift.core.tokenmap import TokenMap
from tokenthrift.models.adapters import adapter_for
from tokenthrift.models.encoder import EncoderAdapter
from tokenthrift.vision.tome import ToMe

TINY = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 40, "patch_size": 8}
CLIP = dict(TINY, intermediate_size=48)

DINO = SimpleNamespace(layers="encoder.layer", norm1="norm1", attention="attention", norm2="norm2")
VIT = SimpleNamespace(layers="layers", norm1="layernorm_before", attention="attention", norm2="layernorm_after")
SELF = SimpleNamespace(layers="encoder.layers", norm1="layer_norm1", attention="self_attn", norm2="layer_norm2")


def dinov2(**more):
    # init_values of LayerScale so large that a forgotten one would show
    return Dinov2Model(Dinov2Config(**TINY, layerscale_value=0.7, **more))


MODELS = {
    "dinov2": (dinov2, DINO, 1),
    "dinov2-swiglu": (lambda: dinov2(use_swiglu_ffn=True), DINO, 1),
    "dinov2-registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TINY, num_register_tokens=3)),
        DINO,
        4,
    ),
    "vit": (lambda: ViTModel(ViTConfig(**TINY, intermediate_size=48)), VIT, 1),
    "deit": (lambda: DeiTModel(DeiTConfig(**TINY, intermediate_size=48)), VIT, 2),
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**CLIP)), SELF, 1),
    "siglip": (lambda: SiglipVisionModel(SiglipVisionConfig(**CLIP)), SELF, 0),
}


def build(name, attention="sdpa", seed=0):
    torch.manual_seed(seed)
    model = MODELS[name][0]().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:  # weights of one scale for all families: large enough to tell tokens apart
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    model.set_attn_implementation(attention)
    return model


@pytest.fixture(autouse=True)
def _quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are so small that threads only wait for each other
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def pixels(batch=2, height=40, width=40, seed=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def features(model, x):
    return model(x).last_hidden_state


def part(module, path):
    for name in path.split("."):
        module = getattr(module, name)
    return module


def merged_by_hand(model, names, prefix, x, method):
    """The encoder's last hidden state (before its final norm), written out with the reduction inside each block."""
    inputs = []
    layers = part(model, names.layers)
    handle = layers[0].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    model(x)
    handle.remove()
    h, sizes = inputs[0], None
    for i, layer in enumerate(layers):
        attention, n = part(layer, names.attention), h.shape[1]
        normed = part(layer, names.norm1)(h)
        q, k, v = (
            getattr(attention, f"{p}_proj")(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for p in "qkv"
        )
        scores = q @ k.transpose(-1, -2) / attention.head_dim**0.5
        if sizes is not None and method.prop_attn:
            scores = scores + sizes.log()[:, None, None]
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        out = (attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj)(mixed)
        h = h + (layer.layer_scale1(out) if hasattr(layer, "layer_scale1") else out)
        ones = torch.ones(h.shape[:2]) if sizes is None else sizes
        view = tt.View(
            features=h, keys=k, sizes=ones, protected=(torch.arange(n) < prefix).expand(h.shape[:2]),
            prefix=prefix, grid=(1, 5, 5), layer=i, layers=len(layers),
        )  # fmt: skip
        map = method.reduce(view)
        if map is not None:
            dense = map.dense()
            h, sizes = dense @ h, (dense > 0).float().matmul(ones.unsqueeze(-1)).squeeze(-1)
        out = layer.mlp(part(layer, names.norm2)(h))
        h = h + (layer.layer_scale2(out) if hasattr(layer, "layer_scale2") else out)
    return h


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [ToMe(r=4), ToMe(r=[0, 5, 3], prop_attn=False), ToMe(keep=0.3)], ids=str)
def test_equals_the_merged_block_written_out(name, attention, method):
    _, names, prefix = MODELS[name]
    model = build(name, attention)
    expected = merged_by_hand(model, names, prefix, pixels(), method)
    last = []
    handle = part(model, names.layers)[-1].register_forward_hook(lambda m, args, out: last.append(out))
    with tt.apply(tt.Plan(vision=method), model):
        out = features(model, pixels())
    handle.remove()
    assert last[0].shape == expected.shape and out.shape[1] == expected.shape[1] < 25
    torch.testing.assert_close(last[0], expected, rtol=1e-5, atol=1e-5)
    assert (features(model, pixels())[:, prefix:].mean(1) - out[:, prefix:].mean(1)).abs().max() > 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("call", ["tome(r=0)", "tome(keep=1.0)", "tome(r=[0, 0])"])
def test_no_reduction_is_bit_identical(name, attention, call):
    model = build(name, attention)
    with tt.apply(f"vision={call}", model) as session:
        assert torch.equal(features(model, pixels()), features_without(name, attention))
    report = session.report()
    assert report.flops == report.flops_dense > 0
    assert session.provenance()["vision"].is_identity


def features_without(name, attention):
    return features(build(name, attention), pixels())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_odd_sizes(attention):
    model, x = build("dinov2", attention), pixels(3, 56, 24)
    dense = features(model, x)
    with tt.apply("vision=tome(r=0)", model):
        assert torch.equal(features(model, x), dense)
    with tt.apply("vision=tome(keep=0.4)", model) as session:
        tokens = features(model, x)
    assert tokens.shape == (3, 1 + 8, 24)  # 0.4 of 7 x 3 patches
    assert session.provenance()["vision"].unmerge(tokens).shape == dense.shape


def trace(model):
    """Everything a session could leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
             "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks")  # fmt: skip
    modules = {n: ({h: dict(getattr(m, h)) for h in hooks}, sorted(vars(m))) for n, m in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return modules, model.config.to_dict(), model.config._attn_implementation, state


def same_trace(a, b):
    return a[:3] == b[:3] and all(torch.equal(v, b[3][k]) for k, v in a[3].items())


@pytest.mark.parametrize("name", MODELS)
def test_leaves_no_trace(name):
    model = build(name)
    before, dense = trace(model), features(model, pixels())
    with tt.apply("vision=tome(r=4)", model):
        features(model, pixels())
    assert same_trace(trace(model), before)
    assert torch.equal(features(model, pixels()), dense)


def test_leaves_no_trace_after_an_exception_inside_a_layer():
    model = build("dinov2")
    before, dense = trace(model), features(model, pixels())

    def fail(module, args):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), tt.apply("vision=tome(r=4)", model) as session:
        handle = model.encoder.layer[1].mlp.register_forward_pre_hook(fail)
        try:
            features(model, pixels())
        finally:
            handle.remove()
    assert same_trace(trace(model), before)
    assert torch.equal(features(model, pixels()), dense)
    assert session.report().forwards == 0


def test_a_forward_after_a_failed_one_is_independent_of_it():
    model = build("dinov2")
    with tt.apply("vision=tome(r=4)", model):
        expected = features(model, pixels())
        handle = model.encoder.layer[1].mlp.register_forward_pre_hook(lambda m, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            features(model, pixels(3))
        handle.remove()
        mlp = model.encoder.layer[1].mlp
        assert mlp(torch.ones(1, 4, 24)).shape == (1, 4, 24)  # a module on its own is not reduced
        assert torch.equal(features(model, pixels()), expected)


def test_repeated_forwards_are_independent():
    model = build("dinov2")
    with tt.apply("vision=tome(r=4)", model) as session:
        first = features(model, pixels())
        assert features(model, pixels(1, 56, 56, seed=5)).shape[1] == 50 - 12
        assert torch.equal(features(model, pixels()), first)
        assert session.report().forwards == 3
    with session:  # a session may be entered again
        assert torch.equal(features(model, pixels()), first)


def test_batch_rows_are_independent():
    model = build("dinov2")
    with tt.apply("vision=tome(r=4)", model):
        both = features(model, pixels(2))
        one = features(model, pixels(2)[1:])
    torch.testing.assert_close(both[1:], one, rtol=1e-5, atol=1e-5)


def test_record_and_provenance():
    model = build("dinov2-registers")
    with tt.apply("vision=tome(keep=0.4)", model) as session:
        tokens = features(model, pixels())
    record, map = session.report().stages["vision"], session.provenance()["vision"]
    assert (record.calls, record.tokens_before, record.tokens_after) == (1, 2 * 29, 2 * 14)
    assert record.seconds > 0
    assert isinstance(map, TokenMap) and (map.n_in, map.n_out) == (29, tokens.shape[1])
    torch.testing.assert_close(map.sizes().sum(-1), torch.tensor([29.0, 29.0]))
    assert torch.equal(map.owner[:, :4], torch.arange(4).expand(2, 4))  # CLS and registers stay in front
    assert torch.equal(map.unmerge(tokens)[:, :4], tokens[:, :4])


@pytest.mark.parametrize("name", ["dinov2", "dinov2-swiglu", "vit", "clip"])
def test_flops_are_those_that_torch_counts(name):
    model = build(name, "eager")
    heads = [m for m in (getattr(model, "pooler", None),) if m is not None]
    pooling = 2 * 2 * sum(p.numel() for m in heads for p in m.parameters() if p.dim() == 2)
    with FlopCounterMode(display=False) as dense:
        features(model, pixels())
    with tt.apply("vision=tome(r=5)", model) as session, FlopCounterMode(display=False) as reduced:
        features(model, pixels())
    prefix = MODELS[name][2]
    widths = [prefix + 25, prefix + 20, prefix + 15]
    matching = sum(2 * 2 * ((n + 1) // 2) * (n // 2) * 12 for n in widths)
    report = session.report()
    assert report.flops_dense == dense.get_total_flops() - pooling
    assert report.flops == reduced.get_total_flops() - pooling - matching


def test_inside_a_classifier_every_patch_counts():
    torch.manual_seed(0)
    model = Dinov2ForImageClassification(Dinov2Config(**TINY, layerscale_value=0.7, num_labels=5)).eval()
    assert adapter_for(model).encoder is model.dinov2
    with tt.apply("vision=tome(r=6)", model) as session:
        logits = model(pixels()).logits
        assert torch.equal(model(pixels(), return_dict=False)[0], logits)
    with tt.apply("vision=tome(r=6)", model.dinov2):
        tokens = model.dinov2(pixels()).last_hidden_state
    map = session.provenance()["vision"]
    sizes = map.sizes()[:, 1:, None]
    mean = (tokens[:, 1:] * sizes).sum(1) / sizes.sum(1)
    torch.testing.assert_close(model.classifier(torch.cat([tokens[:, 0], mean], dim=1)), logits, rtol=1e-5, atol=1e-5)


def test_siglip_pools_over_every_patch():
    model = build("siglip")
    with tt.apply("vision=tome(r=6)", model) as session:
        out = model(pixels())
    dense = session.provenance()["vision"].unmerge(out.last_hidden_state)
    torch.testing.assert_close(out.pooler_output, model.head(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "encoder"),
    [
        (lambda: ViTForImageClassification(ViTConfig(**TINY, intermediate_size=48)), "vit"),
        (lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP)), "vision_model"),
    ],
)
def test_finds_the_encoder_inside(model, encoder):
    model = model().eval()
    assert adapter_for(model).encoder is getattr(model, encoder)
    dense = model(pixels())[0]
    with tt.apply("vision=tome(r=4)", model) as session:
        assert model(pixels())[0].shape == dense.shape
    assert session.report().stages["vision"].kept < 0.6


@pytest.mark.parametrize("early", [True, False])
def test_hidden_states_have_the_widths_of_the_layers(early):
    model = build("dinov2")
    if early:  # transformers installs its own hooks on first use and keeps them
        model(pixels(), output_hidden_states=True)
    with tt.apply("vision=tome(r=4)", model):
        states = model(pixels(), output_hidden_states=True).hidden_states
    assert [s.shape[1] for s in states] == [26, 22, 18, 14]


def test_half_precision_and_gradients():
    model = build("dinov2").to(torch.bfloat16)
    with tt.apply("vision=tome(r=4)", model):
        out = features(model, pixels().to(torch.bfloat16))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    model = build("dinov2")
    with torch.enable_grad(), tt.apply("vision=tome(r=4)", model):
        features(model, pixels()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if "mask" not in n)


# ---- what methods may look at ----------------------------------------------------------------------------------------


@tt.method("_keep_attended", stage="vision", paper="(a test)", needs=("attention", "prefix", "features"))
class KeepAttended:
    """Keep the CLS token and, of each image, the patches to which it attends more than average (numbers differ)."""

    seen: object = None

    def reduce(self, view):
        attention = view.attention(slice(0, 1)).mean(1)[:, 0]
        self.seen.append(attention)
        keep = attention >= attention.mean(-1, keepdim=True)
        keep[:, : view.prefix] = True
        return TokenMap.keep(keep) if view.layer == 1 else None


def test_attention_rows_and_pruning_to_different_numbers():
    model, rows = build("dinov2", "eager"), []
    model.encoder.layer[0].attention.register_forward_hook(lambda m, args, out: rows.append(out[1][:, :, 0].mean(1)))
    seen, x = [], pixels(seed=2)
    with tt.apply(tt.Plan(vision=KeepAttended(seen=seen)), model) as session:
        both = features(model, x)
        torch.testing.assert_close(seen[0], rows[0])
        map = session.provenance()["vision"]
        real = map.mask.sum(-1)
        assert not map.mask.all() and real.max() == both.shape[1]
        for i in range(2):  # padding is not attended to: every image alone gives the same
            alone = features(model, x[i : i + 1])
            torch.testing.assert_close(both[i : i + 1, : real[i]], alone, rtol=1e-5, atol=1e-5)


# ---- what users get wrong --------------------------------------------------------------------------------------------


def test_models_that_do_not_fit_say_what_does():
    t5 = T5EncoderModel(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=20))
    assert not EncoderAdapter.fits(t5)
    with pytest.raises(tt.ThriftError, match=r"T5EncoderModel; supported are .*DINOv2, ViT, .*FAMILIES"):
        tt.apply("vision=tome(r=4)", t5)


def test_an_image_smaller_than_a_patch():
    model, too_small = build("dinov2"), r"5 x 40 pixels is smaller than a patch \(8 x 8\)"
    with pytest.raises(tt.ThriftError, match=too_small), tt.apply("vision=tome(r=2)", model):
        features(model, pixels(1, 5, 40))


def test_masked_tokens_are_left_out_of_the_reduction():
    model, mask = build("dinov2", "eager"), torch.ones(2, 26, dtype=torch.long)
    mask[0, -3:] = 0
    dense = model(pixels(), attention_mask=mask).last_hidden_state
    with tt.apply("vision=tome(r=0)", model):
        assert torch.equal(model(pixels(), attention_mask=mask).last_hidden_state, dense)
    with tt.apply("vision=tome(r=2)", model) as session:
        model(pixels(), attention_mask=mask)
    map = session.provenance()["vision"]
    assert map.n_out == 20 and (map.owner[0, -3:] == -1).all() and map.mask[0].sum() == 17
    with pytest.raises(tt.ThriftError, match="dimensions"), tt.apply("vision=tome(r=2)", model):
        model(pixels(), attention_mask=mask[:, None, None].bool())


def test_other_attention_kernels_are_refused():
    model = build("dinov2")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(tt.ThriftError, match="set_attn_implementation"), tt.apply("vision=tome(r=2)", model):
        pass
    with tt.apply("vision=tome(r=2, prop_attn=False)", model):
        pass


def test_other_stages_and_two_methods_are_refused():
    model = build("dinov2")
    with pytest.raises(tt.ThriftError, match="one method at a time"), tt.apply("tome(r=2) tome(r=3)", model):
        pass
    assert not model._forward_hooks
