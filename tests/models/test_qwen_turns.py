"""Models with positions of time, height and width: new images in later turns, with the cache of the earlier ones.

transformers cannot tell the positions of a later image from the turn alone: a forward is given them, and ``generate``
the grids of all images, with the features of the new ones.
"""

from __future__ import annotations

import pytest
import torch

import tokenthrift as tt
from tiny_vlms import IMAGE, pictured, row, tiny_vlm

FAMILY = pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
PLANS = pytest.mark.parametrize(
    "plan",
    [
        "connector=random_tokens(keep=1.0)",
        "connector=random_tokens(keep=0.25)",
        "connector=random_tokens(keep=0.25, positions='original')",
        "connector=pool_tokens(keep=4)",
    ],
)
WHOLE = row([5, 6], 36, [7, 8], [9, 4, 5], 36, [8], [3, 4, 6])
ENDS = (40, 80, 83)
"""A turn with an image, another with the next, and one of text."""
HOW = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE, IMAGE + 1]}


def close(a, b):
    return torch.allclose(a, b, atol=3e-4, rtol=1e-3)


def conversation(family):
    model, inputs = tiny_vlm(family), pictured(family, [WHOLE], 2)
    names = ("image_grid_thw", "attention_mask", "mm_token_type_ids")
    positions, _ = model.model.get_rope_index(inputs["input_ids"], **{name: inputs[name] for name in names})
    return model, inputs, positions


def of_image(inputs, i):
    return {
        "pixel_values": inputs["pixel_values"][144 * i : 144 * (i + 1)],
        "image_grid_thw": inputs["image_grid_thw"][:1],
    }


@FAMILY
@PLANS
@torch.no_grad()
def test_turns_by_forwards_are_what_the_whole_conversation_is(family, plan):
    model, inputs, positions = conversation(family)
    with tt.apply(plan, model):
        expected = model(**inputs).logits
        cache, start, got = None, 0, []
        for i, end in enumerate(ENDS):
            given = {name: inputs[name][:, start:end] for name in ("input_ids", "mm_token_type_ids")}
            given |= {"attention_mask": inputs["attention_mask"][:, :end], "position_ids": positions[..., start:end]}
            out = model(**given, **(of_image(inputs, i) if i < 2 else {}), past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, end
            got.append(out.logits)
            assert cache.get_seq_length() == end
    assert close(torch.cat(got, 1), expected)


@FAMILY
@PLANS
@torch.no_grad()
def test_turns_of_generation_are_what_the_whole_conversation_is(family, plan):
    """A question about an image and its answer; then another image and a question, over the cache of the first turn."""
    model, inputs, _ = conversation(family)
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    with tt.apply(plan, model):
        first = model.generate(
            **{name: inputs[name][:, : ENDS[0]] for name in names},
            **of_image(inputs, 0),
            **HOW,
            return_dict_in_generate=True,
        )
        ids = torch.cat([first.sequences, inputs["input_ids"][:, ENDS[0] :]], 1)
        rest = {
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == IMAGE).int(),
            "image_grid_thw": inputs["image_grid_thw"],
        }
        new = model.model.get_image_features(**of_image(inputs, 1))
        again = model.generate(
            ids, **rest, mm_encoder_outputs={"image": new}, past_key_values=first.past_key_values, **HOW
        )
        assert torch.equal(again, model.generate(ids, **rest, pixel_values=inputs["pixel_values"], **HOW))


@FAMILY
@torch.no_grad()
def test_turns_without_a_session_are_as_those_that_keep_everything(family):
    """What transformers itself makes of a later turn whose positions it is not given: with a mask nothing at all."""
    model, inputs, _ = conversation(family)

    def turns():
        cache, start, got = None, 0, []
        for i, end in enumerate(ENDS):
            given = {name: inputs[name][:, start:end] for name in ("input_ids", "mm_token_type_ids")}
            out = model(**given, **(of_image(inputs, i) if i < 2 else {}), past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, end
            got.append(out.logits)
        return torch.cat(got, 1)

    expected = turns()
    with tt.apply("connector=random_tokens(keep=1.0)", model):
        assert torch.equal(turns(), expected)
