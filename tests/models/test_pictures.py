"""Layouts of images, and what the encoder did with the patches behind each token, against dense restatements."""

from __future__ import annotations

import pytest
import torch

import tokenthrift as tt
from tiny_vlms import IMAGE, VIDEO, batch, images, packed, patches, pictured, row, tiny_vlm
from tokenthrift.core.errors import ThriftError
from tokenthrift.core.method import method
from tokenthrift.core.tokenmap import TokenMap

SEEN = {}


@method(
    "spy_on_view", stage="connector", paper="A test", needs=("features", "mask", "cls", "received", "keys", "hidden")
)
class SpyOnView:
    """Keep everything, and look at what the view offers."""

    layer: int = 1
    cls: bool = False

    def encoder_layers(self, count):
        return [self.layer]

    def reduce(self, view):
        SEEN.clear()
        SEEN.update(received=view.received(self.layer), keys=view.keys(self.layer), hidden=view.hidden(self.layer))
        SEEN.update(features=view.features, segments=view.segments, protected=view.protected)
        if self.cls:
            SEEN["cls"] = view.cls(self.layer)
        return TokenMap.identity(view.mask.shape[1], view.mask.shape[:1])


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
@torch.no_grad()
def test_crops_of_a_mosaic(family):
    model, given, lengths = packed([(28, 96), (96, 48)], family)
    inputs = {**batch([row([3], *lengths[:1], [4, 5], *lengths[1:], [6])]), **given}
    if family == "llava_onevision":
        assert lengths == [36 + 4 * 13, 36 + 12 * 7]  # rows of patches that are padding are left out
    expected = model(**inputs).logits
    with tt.apply("connector=spy_on_view(layer=1)", model) as session:
        assert torch.equal(model(**inputs).logits, expected)
    first, second = session.adapter.pictures()
    thumbnail, *crops = first.picture.segments
    assert (thumbnail.start, thumbnail.h, thumbnail.w, thumbnail.kind) == (0, 6, 6, "image")
    assert [(c.row, c.col, c.h, c.w, c.kind) for c in crops] == [(0, 0, 4, 6, "crop"), (0, 1, 4, 6, "crop")]
    mosaic = 36 + torch.arange(52).view(4, 13)
    assert first.picture.protected.nonzero().squeeze(-1).tolist() == mosaic[:, 12].tolist()
    assert torch.equal(crops[1].numbers(), mosaic[:, 6:12].flatten())
    assert [(c.row, c.col) for c in second.picture.segments[1:]] == [(0, 0), (1, 0)]
    assert first.columns[0] == 1 and second.columns[0] == 1 + lengths[0] + 2


@torch.no_grad()
def test_a_mosaic_made_smaller():
    """LLaVA-OneVision resizes large mosaics: 12 x 12 patches where 2 crops are allowed."""
    model, given, lengths = packed([(96, 96)], "llava_onevision")
    inputs = {**batch([row([3], *lengths, [4])]), **given}
    with tt.apply("connector=spy_on_view(layer=1)", model) as session:
        model(**inputs)
    segments = session.adapter.pictures()[0].picture.segments
    assert lengths == [36 + 8 * 9]
    assert [(s.h, s.w) for s in segments] == [(6, 6), (4, 4), (4, 4), (4, 4), (4, 4)]
    assert SEEN["keys"].shape == (1, 4, 108, 8)


def dense(model, pixels, layer):
    """Attention ``(images, heads, n, n)``, keys and the output of one layer, by transformers' own outputs."""
    eager = tiny_vlm(model, "eager").model
    tower = getattr(eager, "vision_tower", None) or eager.vision_model
    keys = {}
    attention = next(m for m in encoder_layers(tower)[layer].modules() if hasattr(m, "is_causal"))
    attention.k_proj.register_forward_hook(lambda _m, _i, out: keys.update(keys=out))
    out = tower(pixels, output_attentions=True, output_hidden_states=True)
    return out.attentions[layer], keys["keys"].unflatten(-1, (4, 8)).transpose(1, 2), out.hidden_states[layer + 1]


def encoder_layers(tower):
    return next(m for m in tower.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)


@pytest.mark.parametrize("family", ["llava", "internvl", "smolvlm", "idefics3", "gemma3"])
@torch.no_grad()
def test_what_the_encoder_did(family):
    model = tiny_vlm(family)
    inputs = pictured(family, [row([5], 36, [7]), row([3], 36, [8])], 2)
    has_cls = family in ("llava", "internvl")
    with tt.apply(f"connector=spy_on_view(layer=1, cls={has_cls})", model):
        model(**inputs)
    attention, keys, hidden = dense(family, images(2), 1)
    prefix = int(has_cls)
    side = 1 if family == "llava" else 2

    def tokens(x):
        """(images, patches, ...) to the mean over each token's patches."""
        if side == 1:
            return x
        x = x.view(2, 6, 2, 6, 2, *x.shape[2:])
        return x.mean((2, 4)).flatten(1, 2)

    assert torch.allclose(SEEN["received"], tokens(attention.mean((1, 2))[:, prefix:]), atol=1e-6)
    assert torch.allclose(SEEN["hidden"], tokens(hidden[:, prefix:]), atol=1e-4)
    expected = tokens(keys[:, :, prefix:].transpose(1, 2)).transpose(1, 2)
    assert torch.allclose(SEEN["keys"], expected, atol=1e-4)
    if has_cls:
        expected = tokens(attention[:, :, 0, 1:].transpose(1, 2)).transpose(1, 2)
        assert torch.allclose(SEEN["cls"], expected, atol=1e-6)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_what_an_encoder_of_one_sequence_did(family, layer):
    """Two images one after the other; Qwen2.5's layer 0 attends within windows of 2 x 2 tokens, in another order."""
    model = tiny_vlm(family)
    inputs = pictured(family, [row([5], 36, [7]), row([3], 36, [8])], 2)
    seen = []
    block = model.model.visual.blocks[layer]
    block.attn.register_forward_pre_hook(lambda _m, a, k: seen.append((a, k)), with_kwargs=True)
    block.register_forward_hook(lambda _m, _a, out: seen.append(out))
    with tt.apply(f"connector=spy_on_view(layer={layer})", model):
        model(**inputs)
    windows = family == "qwen2_5_vl" and layer == 0
    order = torch.arange(72)
    if family == "qwen2_5_vl":
        grid = torch.arange(72).view(2, 3, 2, 3, 2)
        order = grid.permute(0, 1, 3, 2, 4).flatten()
    (args, kwargs), hidden = seen
    x = args[0] if args else kwargs["hidden_states"]
    q, k, _ = block.attn.qkv(x).view(288, 3, 4, 8).permute(1, 2, 0, 3)
    cos, sin = kwargs["position_embeddings"]

    def turn(t):
        half = torch.cat([-t[..., 4:], t[..., :4]], -1)
        return t * cos + half * sin

    q, k = turn(q), turn(k)
    hide = torch.arange(288)[:, None] // (16 if windows else 144) != torch.arange(288) // (16 if windows else 144)
    attention = ((q @ k.transpose(1, 2)) * 8**-0.5).masked_fill(hide, -torch.inf).softmax(-1)
    received = attention.mean(0).sum(0).view(72, 4).mean(1) / 144

    def back(x):
        out = torch.empty_like(x)
        out[order] = x
        return out

    assert torch.allclose(SEEN["received"].flatten(), back(received), atol=1e-6)
    assert torch.allclose(SEEN["hidden"].flatten(0, 1), back(hidden.view(72, 4, -1).mean(1)), atol=1e-4)
    keys = back(k.transpose(0, 1).reshape(72, 4, 4, 8).mean(1)).view(2, 36, 4, 8).transpose(1, 2)
    assert torch.allclose(SEEN["keys"], keys, atol=1e-4)


@torch.no_grad()
def test_videos():
    model = tiny_vlm("llava_onevision")
    pixels = images(8).view(2, 4, 3, 48, 48)
    ids = batch([[3] + [VIDEO] * 37 + [4] + [VIDEO] * 37 + [5]])
    with tt.apply("connector=spy_on_view(layer=1)", model) as session:
        model(**ids, pixel_values_videos=pixels)
    first = session.adapter.pictures()[0].picture
    assert [(s.t, s.h, s.w, s.kind) for s in first.segments] == [(4, 3, 3, "frame")]
    assert first.protected.nonzero().tolist() == [[36]]
    assert SEEN["received"].shape == (2, 37)

    model = tiny_vlm("qwen2_5_vl")
    ids = batch([[3] + [VIDEO] * 72 + [4]])
    kinds = 2 * (ids["input_ids"] == VIDEO).int()
    grid = torch.tensor([[2, 12, 12]])
    with tt.apply("connector=spy_on_view(layer=1)", model) as session:
        model(**ids, pixel_values_videos=patches(images(2)), video_grid_thw=grid, mm_token_type_ids=kinds)
    assert [(s.t, s.h, s.w, s.kind) for s in SEEN["segments"]] == [(2, 6, 6, "frame")]


@torch.no_grad()
def test_patches_that_are_padding():
    """An image of SmolVLM whose right half is no image: its patches receive nothing."""
    model = tiny_vlm("smolvlm")
    inputs = pictured("smolvlm", [row([5], 36, [7])], 1)
    shown = torch.ones(1, 1, 48, 48, dtype=torch.bool)
    shown[..., 24:] = False
    with tt.apply("connector=spy_on_view(layer=1)", model):
        model(**inputs, pixel_attention_mask=shown)
    received = SEEN["received"].view(6, 6)
    assert received[:, 3:].eq(0).all() and torch.isclose(received.sum() * 4, torch.tensor(0.5))


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("plan", ["random_tokens(keep=20)", "pool_tokens(keep=0.25)"])
@torch.no_grad()
def test_packed_images_with_fewer_tokens(family, plan):
    model, given, lengths = packed([(28, 96), (96, 48)], family)
    inputs = {**batch([row([3], *lengths[:1], [4, 5], *lengths[1:], [6])]), **given}
    with tt.apply(f"connector={plan}", model) as session:
        out = model(**inputs)
    map = session.provenance()["connector"]
    for placed in session.adapter.pictures():
        newlines = placed.columns[placed.picture.protected]
        assert map.kept[0, newlines].all()
    words = model.get_input_embeddings()(inputs["input_ids"])
    words[inputs["input_ids"] == IMAGE] = torch.cat(model.model.get_image_features(**given).pooler_output)
    hidden = model.model.language_model(inputs_embeds=map.dense() @ words).last_hidden_state
    assert torch.allclose(out.logits[:, map.anchors[0]], model.lm_head(hidden), atol=3e-4, rtol=1e-3)


@torch.no_grad()
def test_videos_with_fewer_tokens():
    """Qwen3-VL writes each frame on its own, with text between; positions are those of the model, closed up."""
    model = tiny_vlm("qwen3_vl")
    ids = batch([[3] + [VIDEO] * 36 + [4] + [VIDEO] * 36 + [5]])
    kinds = 2 * (ids["input_ids"] == VIDEO).int()
    given = {"pixel_values_videos": patches(images(2)), "video_grid_thw": torch.tensor([[2, 12, 12]])}
    seen = {}
    hook = model.model.language_model.rotary_emb.register_forward_pre_hook(lambda _m, a: seen.update(at=a[1]))
    with tt.apply("connector=center_tokens(keep=8)", model) as session:
        model(**ids, **given, mm_token_type_ids=kinds)
    hook.remove()
    (video,) = session.adapter.pictures()
    assert [(s.t, s.h, s.w) for s in video.picture.segments] == [(2, 6, 6)]
    assert session.report().stages["connector"].tokens_after == 8
    text, frame = [[0], [0], [0]], [[1, 1, 1, 1], [1, 1, 2, 2], [1, 2, 1, 2]]
    later = [[x + 3 for x in axis] for axis in frame]
    expected = [t + f + [3] + g + [6] for t, f, g in zip(text, frame, later, strict=True)]
    assert seen["at"][:, 0].tolist() == expected


@torch.no_grad()
def test_no_cls_token():
    model, inputs = tiny_vlm("gemma3"), pictured("gemma3", [row([5], 36, [7])], 1)
    with (
        tt.apply("connector=spy_on_view(layer=1, cls=True)", model),
        pytest.raises(ThriftError, match=r"has no CLS token .* hiprune or divprune"),
    ):
        model(**inputs)


def test_a_layer_that_is_not_there():
    with pytest.raises(ThriftError, match="layer 7 of an encoder with 3 layers: name some of 0 to 2"):
        tt.apply("connector=spy_on_view(layer=7)", tiny_vlm("llava")).install()
