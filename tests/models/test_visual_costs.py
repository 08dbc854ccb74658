"""The FLOPs that a session reports for a vision-language model, against those that torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tokenthrift as tt
from tiny_models import fingerprint
from tiny_vlms import EVERY, batch, images, packed, pictured, row, tiny_vlm

FAMILY = pytest.mark.parametrize("family", EVERY)


def eager(family):
    """Torch does not count the FLOPs of its own attention on a CPU."""
    if family in ("llava_next", "llava_onevision"):
        model, given, (n,) = packed([(28, 96)], family)
        model.set_attn_implementation("eager")
        return model, {**batch([row([5, 6], n, [7])]), **given}
    return tiny_vlm(family, "eager"), pictured(family, [row([5, 6], 36, [7], 36, [8])], 2)


def counted(call):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def calls(model, inputs):
    """A prompt, and three steps of generation after it."""
    cache = model(**inputs, use_cache=True).past_key_values
    text = torch.tensor([[4]])
    for _ in range(3):
        model(input_ids=text, past_key_values=cache)


@FAMILY
@pytest.mark.parametrize("keep", [1.0, 0.25])
def test_encoder_projector_and_language_model_are_counted(family, keep):
    model, inputs = eager(family)
    plain = counted(lambda: calls(model, inputs))
    before = fingerprint(model)
    with tt.apply(f"connector=random_tokens(keep={keep})", model) as session:
        flops = counted(lambda: calls(model, inputs))
    report = session.report()
    # Rotations are tiny products too, and no part of the report.
    assert report.flops == pytest.approx(flops, rel=0.01) and report.flops <= flops
    assert report.flops_dense == pytest.approx(plain, rel=0.01)
    assert (report.flops < 0.9 * report.flops_dense) == (keep < 1)
    assert fingerprint(model) == before


@FAMILY
def test_generation_counts_the_images_once(family):
    model, inputs = eager(family)
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with tt.apply("cache=knorm(budget=1.0)", model) as session:
        flops = counted(lambda: model.generate(**inputs, **how))
    assert session.report().flops == pytest.approx(flops, rel=0.01)
    assert session.report().flops == session.report().flops_dense


@pytest.mark.parametrize("plan", ["vision=tome(keep=0.5)", "vision=tome(keep=0.5) connector=random_tokens(keep=8)"])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_an_encoder_that_is_reduced_is_counted_by_its_stage(family, plan):
    model, inputs = eager(family)
    plain = counted(lambda: calls(model, inputs))
    with tt.apply(plan, model) as session:
        flops = counted(lambda: calls(model, inputs))
    report = session.report()
    # ToMe's own comparisons of keys are not in the report: tens of tokens, so that they count here.
    assert report.flops == pytest.approx(flops, rel=0.03) and report.flops <= flops
    assert report.flops_dense == pytest.approx(plain, rel=0.01)


def test_prompts_of_text_cost_no_images():
    model, text = tiny_vlm("llava", "eager"), batch([[3, 4, 5, 6]])
    with tt.apply("connector=random_tokens(keep=0.25)", model) as session:
        flops = counted(lambda: model(**text))
    assert session.report().flops == pytest.approx(flops, rel=0.01)
    with tt.apply("connector=random_tokens(keep=0.25)", model) as session:
        encoded = counted(lambda: model.model.get_image_features(images(1)))
    assert session.report().flops == pytest.approx(encoded, rel=0.01)
