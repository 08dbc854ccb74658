"""Every method that acts on visual tokens, on every family of models. New methods and families join by themselves."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import tokenthrift as tt
from tiny_models import fingerprint
from tiny_vlms import EVERY, batch, prompted
from tokenthrift.core.errors import ThriftError

OURS = [info for info in tt.methods() if info.cls.__module__.startswith("tokenthrift.")]
"""The methods of the library: tests declare some of their own."""
CONNECTOR = [info.name for info in OURS if info.stage == "connector"]
PREFILL = [info.name for info in OURS if info.stage == "prefill" and "visual" in info.needs]
ENCODER = [
    info.name for info in OURS if info.stage == "vision" and "keep" in info.defaults and "segments" not in info.needs
]
FAMILY = pytest.mark.parametrize("family", EVERY)
WINDOWS = ("gemma3",)
"""Their prefill methods are refused."""
WITH_CLS = ("llava", "llava_next", "internvl")
"""Those of the tiny models whose encoder has a CLS token."""


@cache
def model_and_inputs(family):
    return prompted(family)


def outputs(model, inputs):
    """Logits and keys of the forward of a prompt, and of two steps of generation after it."""
    out = model(**inputs)
    steps = model.generate(
        **inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return [out.logits, *(layer.keys for layer in out.past_key_values.layers), *steps.logits]


def identical(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@cache
def plain(family, images):
    model, inputs = model_and_inputs(family)
    return outputs(model, inputs if images else text_only())


def text_only():
    return batch([[3, 4, 5, 9, 8], [6, 7]])


@FAMILY
@pytest.mark.parametrize("name", CONNECTOR + PREFILL)
@torch.no_grad()
def test_keeping_everything_and_prompts_of_text_change_no_bit(name, family):
    model, inputs = model_and_inputs(family)
    expected, words = plain(family, True), plain(family, False)
    before = fingerprint(model)
    # Layers are named where the default is made for deeper models than the tiny ones.
    more = ", layer=1" if name == "fastv" else ""
    if family in WINDOWS and name in PREFILL:
        with pytest.raises(ThriftError, match=r"needs layers with full attention; .* sliding windows: use connector="):
            tt.apply(f"{name}(keep=1.0{more})", model).install()
        return
    with tt.apply(f"{name}(keep=1.0{more})", model) as session:
        assert identical(outputs(model, inputs), expected)
    records = session.report().stages.values()
    assert all(record.tokens_before == record.tokens_after for record in records)
    with tt.apply(f"{name}(keep=0.25{more})", model) as session:
        assert identical(outputs(model, text_only()), words)
        assert not session.report().stages
    assert fingerprint(model) == before


@FAMILY
@pytest.mark.parametrize("name", ENCODER)
@torch.no_grad()
def test_encoders_that_keep_everything_change_no_bit_or_are_refused(name, family):
    model, inputs = model_and_inputs(family)
    expected, words = plain(family, True), plain(family, False)
    before = fingerprint(model)
    if family in ("llava", "gemma3"):
        with tt.apply(f"{name}(keep=1.0)", model):
            assert identical(outputs(model, inputs), expected)
        with tt.apply(f"{name}(keep=0.5)", model):
            assert identical(outputs(model, text_only()), words)
    else:
        with pytest.raises(ThriftError, match=r"connector=") as error:
            tt.apply(f"{name}(keep=1.0)", model).install()
        assert "\n" not in str(error.value)
    assert fingerprint(model) == before


@FAMILY
@pytest.mark.parametrize(
    "info", [info for info in OURS if info.name in CONNECTOR + PREFILL], ids=lambda info: info.name
)
@torch.no_grad()
def test_keeping_less_changes_what_is_read_or_says_what_the_encoder_lacks(info, family):
    model, inputs = model_and_inputs(family)
    if family in WINDOWS and info.stage == "prefill":
        return  # refused, see above
    plan = f"{info.name}(keep=0.25{', layer=1' if info.name == 'fastv' else ''})"
    with tt.apply(plan, model) as session:
        if "cls" in info.needs and family not in WITH_CLS:
            with pytest.raises(ThriftError, match=r"has no CLS token .* hiprune or divprune") as error:
                model(**inputs)
            assert "\n" not in str(error.value)
        else:
            assert not torch.equal(model(**inputs).logits, plain(family, True)[0])
            assert session.report().stages[info.stage].kept < 1


def test_there_are_methods_and_families_to_test():
    assert len(CONNECTOR) >= 11 and len(PREFILL) >= 2 and len(ENCODER) >= 10 and len(EVERY) >= 10
