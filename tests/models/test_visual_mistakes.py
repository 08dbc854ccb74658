"""Images and prompts that a vision-language model cannot read, or hardly: what becomes of them inside a session."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tokenthrift as tt
from tiny_models import prompt, tiny
from tiny_vlms import EVERY, IMAGE, ROWS, pictured, prompted, tiny_vlm
from tokenthrift.core.errors import ThriftError
from tokenthrift.models.images import ImageProcessor
from tokenthrift.models.visual_processor import VisualProcessor
from vision.tiny import build

QUARTER = "connector=random_tokens(keep=0.25)"
OURS = [info for info in tt.methods() if info.cls.__module__.startswith("tokenthrift.")]
FAMILY = pytest.mark.parametrize("family", EVERY)


def processor():
    """For the tiny LLaVA: 36 patches of 8 pixels an image."""
    words = {"<pad>": 0, "<unk>": 1, "</s>": 2, "what": 4, "<image>": IMAGE}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "additional_special_tokens": ["<image>"], "padding_side": "left"}
    return VisualProcessor(PreTrainedTokenizerFast(tokenizer_object=backend, **special), ImageProcessor(48, patch=8))


def told(call, *args, **kwargs):
    """The one line that a user's mistake is answered with."""
    with pytest.raises(ThriftError) as error, torch.no_grad():
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- images of every kind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "I;16", "F"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (48, 48)])
@torch.no_grad()
def test_an_image_of_any_mode_and_size_is_read(mode, size):
    model, inputs = tiny_vlm("llava"), processor()(images=Image.new(mode, size), text="<image> what")
    with tt.apply("connector=divprune(keep=9)", model) as session:
        assert model(**inputs).logits.isfinite().all()
    assert session.report().stages["connector"].tokens_after == 9


def test_a_huge_image_takes_little_more_memory_than_it_has_itself():
    """In a process of its own, whose peak this is; 8,000 x 8,000 pixels with transparency are 256 MB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak is read from /proc")
    code = """
import torch
from PIL import Image
from tokenthrift.models.images import preprocess
peak = lambda: next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')) / 1024
image = Image.new('RGBA', (8000, 8000))
before = peak()
assert preprocess(image).shape == (1, 3, 224, 224)
print(peak() - before)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(tt.__file__).parents[1])}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert float(out.stdout) < 2 * 256


def test_files_that_are_no_images(tmp_path, monkeypatch):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "words.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name, said in (
        ("cut.jpg", "damaged"),
        ("words.png", "damaged"),
        ("empty.png", "damaged"),
        ("no.png", "no image"),
    ):
        assert said in told(processor(), images=tmp_path / name, text="<image> what")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "more pixels than Pillow opens (2,000)" in told(processor(), images=whole, text="<image> what")


def test_the_command_line_gives_a_processor_text_and_no_image():
    from tokenthrift.cli.generate import _encode

    assert _encode(processor(), "what", raw=False)["input_ids"].tolist() == [[4]]
    assert "1 <image> in the text but 0 images" in told(_encode, processor(), "<image> what", raw=False)


# ---- pixels and placeholders that do not fit the model ---------------------------------------------------------------


@FAMILY
@torch.no_grad()
def test_pixels_that_do_not_fit_the_model(family):
    model, inputs = prompted(family)
    pixels = inputs["pixel_values"]
    with tt.apply(QUARTER, model):
        assert "the pixels are torch.uint8: give" in told(model, **{**inputs, "pixel_values": pixels.mul(255).byte()})
        if pixels.dim() == 2:
            said = told(model, **{**inputs, "pixel_values": pixels[:-4]})
            assert said.startswith("there are 428 patches, and 432 in the grids")
            return
        lead = pixels.shape[:-3]
        said = told(model, **{**inputs, "pixel_values": torch.rand(*lead, 1, 48, 48)})
        assert said.startswith("images of 1 channels for an encoder of 3: make them")
        said = told(model, **{**inputs, "pixel_values": torch.rand(*lead, 3, 3, 3)})
        assert said.startswith("images of 3 x 3 pixels for an encoder of 48 x 48")
        said = told(model, **{**inputs, "pixel_values": torch.rand(*lead, 3, 56, 56)})
        assert "56 x 56 pixels for an encoder of 48 x 48" in said or "108 image placeholders" in said
        for wrong in (pixels[:-1], torch.cat([pixels, pixels[-1:]])):
            said = told(model, **{**inputs, "pixel_values": wrong})
            assert "give one size for each" in said or "placeholders, and the images given are" in said


@FAMILY
@pytest.mark.parametrize("plan", [QUARTER, "prefill=fastv(keep=0.5, layer=1)"])
@torch.no_grad()
def test_more_or_fewer_placeholders_than_tokens(family, plan):
    model, inputs = prompted(family)
    if family == "gemma3" and "fastv" in plan:
        pytest.skip("refused, as it has sliding windows")
    ids = inputs["input_ids"]
    count = int((ids == IMAGE).sum())
    one_less = ids.clone().index_put_(tuple((ids == IMAGE).nonzero()[0]), torch.tensor(5))
    without = {k: v for k, v in inputs.items() if k not in ("pixel_values", "image_sizes", "image_grid_thw")}
    how = {"max_new_tokens": 2, "do_sample": False}
    with tt.apply(plan, model):
        for call, more in ((model, {}), (model.generate, how)):
            said = told(call, **{**inputs, "input_ids": one_less, **more})
            assert f"{count - 1} image placeholders, and the images given are {count} tokens" in said
            said = told(call, **{**inputs, "input_ids": ids.masked_fill(ids == IMAGE, 5), **more})
            assert "0 image placeholders" in said
            said = told(call, **{**without, **more})
            assert f"{count} image placeholders but no image was given" in said
        assert model(**inputs).logits.isfinite().all()  # mistakes leave nothing behind


def test_an_error_of_the_encoder_that_is_no_mistake_stays_what_it_is():
    model, inputs = tiny_vlm("llava"), pictured("llava", ROWS, 3)

    def fail(*args):
        raise RuntimeError("out of paper")

    model.model.vision_tower.register_forward_pre_hook(fail)
    with tt.apply(QUARTER, model), pytest.raises(RuntimeError, match="out of paper"):
        model(**inputs)


# ---- budgets and plans -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [info.name for info in OURS if info.stage == "connector"])
@pytest.mark.parametrize("keep", [1, 1e-9])
@torch.no_grad()
def test_a_token_of_each_image_stays_whatever_is_kept(name, keep):
    model, inputs = tiny_vlm("llava"), pictured("llava", ROWS, 3)
    with tt.apply(f"{name}(keep={keep})", model) as session:
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert session.report().stages["connector"].tokens_after == 3 and out.shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize(
    "plan", ["vision=pitome(keep=0.01)", "prefill=fastv(keep=1e-9, layer=1)", "pyramiddrop(keep=1e-9)"]
)
@torch.no_grad()
def test_something_stays_in_other_stages_too(plan):
    model, inputs = tiny_vlm("llava"), pictured("llava", ROWS, 3)
    with tt.apply(f"{plan} connector=divprune(keep=1)" if "vision" in plan else plan, model) as session:
        assert model(**inputs).logits.isfinite().all()
    if "vision" in plan:
        assert session.report().stages["connector"].tokens_after == 3
    else:  # the last layer holds the text and one visual token a row
        real = inputs["attention_mask"].sum() - 3 * 36
        assert int(session.provenance()["prefill"].mask.sum()) == real + 2


@pytest.mark.parametrize(
    ("model", "plan", "said"),
    [
        ("text", "connector=divprune()", "has no stage 'connector' here; it offers: text, prefill"),
        ("text", "vision=tome()", "has no stage 'vision' here"),
        ("text", "prefill=fastv()", "reads text only"),
        ("images", "connector=divprune()", "has no stage 'connector' here; it offers: text, vision"),
        ("images", "prefill=fastv()", "has no stage 'prefill' here"),
        ("images", "cache=snapkv()", "has no stage 'cache' here"),
        ("images", "vision=subtokens()", "subtokens works on the words of a text; Dinov2Model reads images"),
        ("both", "vision=subtokens()", "works on the words of a text; CLIPVision"),
        ("both", "prefill=gemfilter()", "reads prompts of text, and this one has images"),
    ],
)
def test_plans_for_another_modality_are_refused(model, plan, said):
    made = {"text": lambda: tiny("llama"), "images": lambda: build("dinov2"), "both": lambda: tiny_vlm("llava")}[
        model
    ]()

    def run():
        with tt.apply(plan, made):
            made(**(pictured("llava", ROWS, 3) if model == "both" else prompt()))

    assert said in told(run)
