"""Connector plans beside other stages, over several turns, with beams, and after mistakes."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

import tokenthrift as tt
from tiny_models import fingerprint, tiny
from tiny_vlms import EVERY, IMAGE, ROWS, alone, images, pictured, row, tiny_vlm
from tokenthrift.core.errors import ThriftError
from tokenthrift.core.method import method
from tokenthrift.core.tokenmap import TokenMap

TURNS = []


@method("in_turn", stage="connector", paper="A test", needs=("mask",))
class InTurn:
    """Keep the first so many tokens of each image, as TURNS says, image by image."""

    def reduce(self, view):
        counts = torch.tensor([TURNS.pop(0) for _ in view.mask])
        return TokenMap.keep(torch.arange(view.mask.shape[1]) < counts[:, None])


QUARTER = "connector=random_tokens(keep=0.25, seed=3)"
PLAIN = [f for f in EVERY if f not in ("llava_next", "llava_onevision")]


def close(a, b):
    return torch.allclose(a, b, atol=3e-4, rtol=1e-3)


def generated(model, inputs, n=4, **kwargs):
    """Tokens after the prompt, none of them a placeholder."""
    how = {"max_new_tokens": n, "do_sample": False, "suppress_tokens": [IMAGE, IMAGE + 1], **kwargs}
    return model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def test_vision_connector_and_cache_together_and_the_way_back():
    model, inputs = tiny_vlm("llava"), pictured("llava", ROWS, 3)
    before = model(**inputs).logits, fingerprint(model)
    plan = "vision=pitome(keep=0.5) connector=random_tokens(keep=10) cache=knorm(budget=8)"
    with tt.apply(plan, model) as session:
        out = model(**inputs)
    maps, stages = session.provenance(), session.report().stages
    pictures = session.adapter.pictures()
    assert stages["vision"].kept < 1 and stages["connector"].tokens_after == 30 and stages["cache"].kept < 1
    assert stages["connector"].tokens_before == sum(p.picture.n for p in pictures) < 3 * 36
    assert out.past_key_values.layers[0].keys.shape[2] == 8
    # From an entry of the cache to a column of the prompt, to a token of an image, to patches of the encoder.
    by_place = {(p.row, int(c)): (p, k) for p in pictures for k, c in enumerate(p.columns)}
    found = 0
    for slot in range(8):
        entry = maps["cache"][0].anchors[1, 0, slot]
        column = int(maps["connector"].anchors[1, entry])
        if (1, column) in by_place:
            placed, k = by_place[1, column]
            token = int(placed.picture.left[k]) + 1  # the encoder's CLS token comes first
            assert column == int(placed.span[token - 1])
            assert 0 < token < 37 and placed.number in (1, 2)
            found += 1
        else:
            assert inputs["input_ids"][1, column] != IMAGE
    assert found
    assert maps["vision"].n_in == 37
    assert fingerprint(model) == before[1]
    assert torch.equal(model(**inputs).logits, before[0])


@torch.no_grad()
def test_a_reduced_encoder_alone_gives_what_its_features_give():
    model, inputs = tiny_vlm("llava"), pictured("llava", [ROWS[0]], 1)
    with tt.apply("vision=pitome(keep=0.5)", model) as session:
        out = model(**inputs)
    tower = model.model.vision_tower
    with tt.apply("vision=pitome(keep=0.5)", tower) as alone:
        hidden = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    features = model.model.multi_modal_projector(hidden[:, 1:])
    map = alone.maps("vision")[0].then(alone.maps("vision")[1]) if len(alone.maps("vision")) == 3 else None
    assert map is not None and map.n_out == hidden.shape[1]
    order = map.anchors[0, 1:].argsort()
    words = model.get_input_embeddings()(inputs["input_ids"])
    short = torch.cat([words[:, :2], features[:, order], words[:, 38:]], 1)
    expected = model.lm_head(model.model.language_model(inputs_embeds=short).last_hidden_state)
    kept = session.provenance()["connector"].source[0]
    assert close(out.logits[0, kept], expected[0])
    assert "connector" not in session.report().stages
    tokens = generated(model, inputs)
    with tt.apply("vision=pitome(keep=1.0)", model):
        assert torch.equal(generated(model, inputs), tokens)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize(
    "plan", ["cache=snapkv(budget=16, window=4)", "attention=quest(budget=16)", "cache=knorm(budget=1.0)"]
)
@torch.no_grad()
def test_stages_of_the_language_model(family, plan):
    model, inputs = tiny_vlm(family), pictured(family, ROWS, 3)
    model(**inputs)
    before = fingerprint(model)
    with tt.apply(plan, model) as session:
        assert generated(model, inputs).shape == (2, 4)
    with tt.apply(f"{QUARTER} {plan}", model) as both:
        out = generated(model, inputs)
    assert both.report().flops < session.report().flops
    if plan.endswith("budget=1.0)"):
        with tt.apply(QUARTER, model):
            assert torch.equal(generated(model, inputs), out)
    assert fingerprint(model) == before


@torch.no_grad()
def test_patches_behind_tokens():
    for family, rows in [("llava", 1), ("internvl", 1), ("qwen2_vl", 1)]:
        model, inputs = tiny_vlm(family), pictured(family, [ROWS[1]], 2)
        with tt.apply(QUARTER, model) as session:
            model(**inputs)
        first, second = session.adapter.pictures()
        map = second.patches()
        patches = 36 if family == "llava" else 144
        assert map.lead == (rows,) and map.n_in == 2 * patches and map.n_out == 36
        assert map.kept[0].nonzero().min() == patches
        assert not (first.patches().kept & map.kept).any()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "smolvlm", "gemma3"])
@torch.no_grad()
def test_beams_and_samples(family):
    """Beams as far as all of them are kept together, samples as far as they are drawn alike."""
    model, inputs = tiny_vlm(family), pictured(family, ROWS, 3)
    with tt.apply(QUARTER, model):
        together = generated(model, inputs, num_beams=3)
        torch.manual_seed(0)
        drawn = model.generate(**inputs, max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert drawn.shape[0] == 4
    for r in range(2):
        with tt.apply(QUARTER, model):
            assert torch.equal(generated(model, alone(family, r), num_beams=3)[0], together[r])


@pytest.mark.parametrize("family", PLAIN)
@torch.no_grad()
def test_without_a_cache(family):
    model, inputs = tiny_vlm(family), pictured(family, ROWS, 3)
    with tt.apply(QUARTER, model):
        expected = generated(model, inputs)
        assert torch.equal(generated(model, inputs, use_cache=False), expected)


@pytest.mark.parametrize("family", PLAIN)
@torch.no_grad()
def test_gaps_between_positions_are_no_borders(family):
    model, inputs = tiny_vlm(family), alone(family, 1)
    inputs.pop("attention_mask")
    with tt.apply(QUARTER.replace(")", ", positions='original')"), model):
        assert close(model(**inputs, use_cache=False).logits, model(**inputs, use_cache=True).logits)


@pytest.mark.parametrize("family", ["llava", "internvl", "smolvlm", "gemma3"])
@pytest.mark.parametrize("positions", ["gapless", "original"])
@torch.no_grad()
def test_later_turns_with_new_images(family, positions):
    """A prompt in two parts, each with an image, then text: as if it came at once."""
    model = tiny_vlm(family)
    whole = row([5, 6], 36, [7, 8], [9, 4, 5], 36, [8], [3, 4, 6])
    ends = [40, 80, 83]
    plan = f"connector=random_tokens(keep=0.25, positions='{positions}')"
    at_once = pictured(family, [whole], 2)
    with tt.apply(plan, model):
        expected = model(**at_once).logits
        cache, start, got = None, 0, []
        for part, end in enumerate(ends):
            inputs = {
                "input_ids": at_once["input_ids"][:, start:end],
                "attention_mask": at_once["attention_mask"][:, :end],
            }
            if part < 2:
                pixels = at_once["pixel_values"]
                inputs["pixel_values"] = pixels[:, part : part + 1] if pixels.dim() == 5 else pixels[part : part + 1]
            if family == "gemma3" and part < 2:
                inputs["token_type_ids"] = at_once["token_type_ids"][:, :end]  # it wants them from the start
            out = model(**inputs, past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, end
            got.append(out.logits)
            assert cache.get_seq_length() == end
    assert close(torch.cat(got, 1), expected)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
@torch.no_grad()
def test_a_later_image_that_stays_whole(family):
    model, whole = tiny_vlm(family), row([5, 6], 36, [7], [9, 4], 36, [8])
    inputs = pictured(family, [whole], 2)
    TURNS[:] = [9, 36, 9, 36]
    with tt.apply("connector=in_turn()", model) as session:
        expected = model(**inputs).logits
        cut = {k: v[:, :39] for k, v in inputs.items() if k != "pixel_values"}
        cache = model(**cut, pixel_values=inputs["pixel_values"][:1], use_cache=True).past_key_values
        more = {**inputs, "input_ids": inputs["input_ids"][:, 39:], "pixel_values": inputs["pixel_values"][1:]}
        got = model(**more, past_key_values=cache).logits
        assert session.report().stages["connector"].tokens_after == 90
    assert close(got, expected[:, 39:])


@torch.no_grad()
def test_rows_as_long_as_each_other_that_keep_different_numbers():
    model = tiny_vlm("llava")
    rows = [row([5, 6] + [7] * 38, 36, [3]), row([5], 36, [6, 7, 8], 36, [3])]
    inputs, pixels = pictured("llava", rows, 3), images(3)
    with tt.apply(QUARTER, model):
        together = model(**inputs).logits
        for r, own in enumerate((pixels[:1], pixels[1:])):
            one = {**pictured("llava", [rows[r]], 1), "pixel_values": own}
            assert close(model(**one).logits[0], together[r])


@torch.no_grad()
def test_a_cache_goes_on_in_another_session_but_not_outside():
    model, inputs = tiny_vlm("llava"), pictured("llava", [ROWS[0]], 1)
    more = torch.tensor([[4, 5]])
    with tt.apply(QUARTER, model):
        cache = model(**inputs).past_key_values
        whole = torch.cat([inputs["input_ids"], more], 1)
        expected = model(input_ids=whole, pixel_values=inputs["pixel_values"]).logits[:, -2:]
    with pytest.raises(ThriftError, match="go on inside a with block"):
        model(input_ids=more, past_key_values=cache)
    with tt.apply("connector=random_tokens(keep=0.5)", model):
        assert close(model(input_ids=more, past_key_values=cache).logits, expected)
        cache.reset()
        model(**inputs, past_key_values=cache)
        assert cache.layers[0].keys.shape[2] == 18 + 5


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "smolvlm", "gemma3"])
@pytest.mark.parametrize("positions", ["gapless", "original"])
@torch.no_grad()
def test_a_turn_of_generation_after_another(family, positions):
    model, inputs = tiny_vlm(family), alone(family, 0)
    how = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE, IMAGE + 1]}
    with tt.apply(QUARTER.replace(")", f", positions='{positions}')"), model):
        first = model.generate(**inputs, **how, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[4, 5, 6]])], 1)
        again = model.generate(ids, past_key_values=first.past_key_values, **how)
        given = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in given:
                given[name] = torch.nn.functional.pad(given[name], (0, ids.shape[1] - given[name].shape[1]))
        assert torch.equal(again, model.generate(ids, **given, **how))


@torch.no_grad()
def test_after_an_exception_nothing_is_left():
    model, inputs = tiny_vlm("llava"), pictured("llava", ROWS, 3)
    expected = model(**inputs).logits
    before = fingerprint(model)

    def fail(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), tt.apply(f"vision=pitome(keep=0.5) {QUARTER}", model):
        handle = model.model.language_model.layers[1].register_forward_hook(fail)
        try:
            model(**inputs)
        finally:
            handle.remove()
    assert fingerprint(model) == before
    assert torch.equal(model(**inputs).logits, expected)
    with tt.apply(QUARTER, model):  # and the same session goes on after one
        handle = model.model.vision_tower.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        handle.remove()
        assert model(**inputs).past_key_values.layers[0].keys.shape[2] == 24
    assert fingerprint(model) == before


@torch.no_grad()
def test_a_loss_is_that_of_the_shorter_text():
    model, inputs = tiny_vlm("llava"), pictured("llava", [ROWS[0]], 1)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    with tt.apply(QUARTER, model):
        out = model(**inputs, labels=labels)
    predicted = torch.log_softmax(out.logits[0, :-1], -1).gather(1, labels[0, 1:].clamp(min=0)[:, None]).squeeze(1)
    assert torch.allclose(out.loss, -predicted[labels[0, 1:] >= 0].mean())
    last = int((inputs["input_ids"][0] == IMAGE).nonzero().max())
    assert out.logits[0, last].abs().sum() > 0  # what predicts the first word after an image that lost its last token


def test_wrong_usage():
    model = tiny_vlm("llava")
    with tt.apply(QUARTER, model), torch.no_grad():
        few = pictured("llava", [row([5], 35, [7])], 1)
        with pytest.raises(ThriftError, match="35 image placeholders, and the images given are 36 tokens"):
            model(**few)
        inputs = pictured("llava", [ROWS[0]], 1)
        made = model.model.get_image_features(images(1))
        expected = model(**inputs).logits
        assert torch.equal(model(inputs["input_ids"], mm_encoder_outputs={"image": made}).logits, expected)
    with tt.apply("connector=random_tokens(keep=0.5)", model), torch.no_grad():
        for made_elsewhere in (made, tiny_vlm("llava").model.get_image_features(images(1))):
            with pytest.raises(ThriftError, match="made: make them inside"):
                model(inputs["input_ids"], mm_encoder_outputs={"image": made_elsewhere})
        with pytest.raises(ThriftError, match="cannot be dropped from a StaticCache"):
            model(**inputs, past_key_values=StaticCache(model.config, max_cache_len=64))
        with pytest.raises(ThriftError, match="leave its with block"):
            tt.apply(QUARTER, model).install()
    with pytest.raises(ThriftError, match=r"no stage 'connector' here; it offers: text, prefill, cache"):
        tt.apply(QUARTER, tiny("llama"))
    with tt.apply("prefill=gemfilter(budget=8)", model) as session, torch.no_grad():
        text = {"input_ids": torch.randint(3, 80, (1, 30))}
        assert generated(model, text).shape == (1, 4) and session.report().stages["prefill"].tokens_after == 8
        with pytest.raises(ThriftError, match="reads prompts of text, and this one has images"):
            generated(model, inputs)
    with pytest.raises(ThriftError, match="reads prompts of text"):
        tt.apply(f"{QUARTER} prefill=gemfilter()", model).install()
    with pytest.raises(ThriftError, match="needs the whole grid"):
        tt.apply("vision=tome()", tiny_vlm("llava_next")).install()
    with pytest.raises(ThriftError, match="'segments' of an encoder whose tokens vision=tome reduces"):
        tt.apply("vision=tome() connector=pool_tokens()", model).install()
    with pytest.raises(ThriftError, match="takes one method at a time"):
        tt.apply({"connector": ["random_tokens", "uniform_tokens"]}, model).install()


@torch.no_grad()
def test_an_encoder_whose_output_is_copied_back():
    model, inputs = tiny_vlm("gemma3"), pictured("gemma3", [ROWS[0]], 1)
    with tt.apply(f"vision=tome(keep=0.5) {QUARTER}", model) as session:
        model(**inputs)
    stages = session.report().stages
    assert stages["vision"].kept < 0.6 and stages["connector"].kept == 0.25


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("positions", ["gapless", "original"])
@torch.no_grad()
def test_drafts_change_nothing(family, positions):
    model, inputs = tiny_vlm(family), alone(family, 1)
    plan = f"connector=random_tokens(keep=0.25, positions='{positions}')"
    with tt.apply(plan, model):
        expected = generated(model, inputs, 10)
    with tt.apply(f"{plan} decode=prompt_lookup()", model):
        assert torch.equal(generated(model, inputs, 10), expected)


@torch.no_grad()
def test_rows_without_images_and_prompts_in_chunks():
    model = tiny_vlm("llava")
    inputs = pictured("llava", [row([5, 6, 7]), *ROWS, [9, 8]], 3)
    with tt.apply(QUARTER, model) as session:
        together = generated(model, inputs)
        for r in range(2):
            assert torch.equal(generated(model, alone("llava", r))[0], together[1 + r])
        words = {k: inputs[k][:1, -3:] for k in ("input_ids", "attention_mask")}
        assert torch.equal(generated(model, words)[0], together[0])
        assert session.report().stages["connector"].kept == 0.25
        with pytest.raises(ThriftError, match="leave out prefill_chunk_size"):
            generated(model, inputs, prefill_chunk_size=16)


@torch.no_grad()
def test_an_image_in_two_rows_is_refused():
    model = tiny_vlm("llava")
    inputs = pictured("llava", [row([5], 35, [7]), row([5], 37)], 2)
    with (
        tt.apply(QUARTER, model),
        pytest.raises(ThriftError, match="row 0 has 35 image placeholders, its images have 36"),
    ):
        model(**inputs)


@torch.no_grad()
def test_later_stages_are_told_which_columns_are_visual():
    model, inputs = tiny_vlm("llava"), pictured("llava", ROWS, 3)
    seen = []
    with tt.apply(QUARTER, model) as session:
        adapter = session.adapter
        handle = model.model.language_model.layers[0].register_forward_hook(lambda *_: seen.append(adapter.visual()))
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        handle.remove()
    assert seen[0].sum(1).tolist() == [9, 18] and seen[0].shape == (2, 24)
    assert seen[0][0].nonzero().min() == 24 - 14 + 2
    assert seen[1] is None and adapter.visual() is None


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
@torch.no_grad()
def test_visual_tokens_dropped_inside_the_language_model(family):
    """FastV after one layer, against the layers run by hand; Qwen3-VL adds image features between layers."""
    model, inputs = tiny_vlm(family, "eager"), alone(family, 1)
    body, seen = model.model.language_model, {}
    note = body.register_forward_pre_hook(lambda _m, _a, kwargs: seen.update(kwargs), with_kwargs=True)
    model(**inputs)
    note.remove()
    x, visual = seen["inputs_embeds"], inputs["input_ids"][0] == IMAGE
    n, deep = x.shape[1], seen.get("deepstack_visual_embeds") or []
    at = torch.arange(n)[None] if seen.get("position_ids") is None else seen["position_ids"]
    turns = body.rotary_emb(x, at)
    mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]
    note = body.layers[0].self_attn.register_forward_hook(lambda _m, _i, out: seen.update(weights=out[1]))
    x = body.layers[0](x, attention_mask=mask, position_embeddings=turns)
    note.remove()
    left = ~visual
    left[seen["weights"][0, :, -1].mean(0).masked_fill(~visual, -1).topk(36).indices] = True
    for i, layer in enumerate(body.layers):
        if i:
            x = layer(x, attention_mask=mask, position_embeddings=turns)
        else:
            which = left[visual]
            x, mask, turns = x[:, left], mask[:, :, left][..., left], [t[..., left, :] for t in turns]
        if i < len(deep):
            x[0, visual[left]] += deep[i][which]
    expected = model.lm_head(body.norm(x))[0]
    with tt.apply("prefill=fastv(keep=36, layer=1)", model) as session:
        assert close(model(**inputs).logits[0, left], expected)
        assert session.report().stages["prefill"].kept < 1
    with tt.apply(f"{QUARTER} prefill=fastv(keep=0.5, layer=1)", model) as session:
        cache = model(**inputs).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [24, 15, 15]
