"""Images and text as a LLaVA takes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tokenthrift.core.errors import ThriftError
from tokenthrift.models.images import ImageProcessor
from tokenthrift.models.visual_processor import VisualProcessor

WORDS = {"<pad>": 0, "<s>": 1, "</s>": 2, "<image>": 3, "what": 4, "is": 5, "this": 6}


def processor(size: int = 28) -> VisualProcessor:
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="this"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    return VisualProcessor(tokenizer, ImageProcessor(size=size))


def image(value: int = 0) -> np.ndarray:
    return np.full((10, 10, 3), value, np.uint8)


def test_a_placeholder_becomes_a_token_for_each_patch() -> None:
    inputs = processor()(images=image(), text="<image> what is")
    assert inputs["input_ids"].tolist() == [[1, 3, 3, 3, 3, 4, 5]]
    assert inputs["pixel_values"].shape == (1, 3, 28, 28)
    assert processor()(images=image(), text="<image>", size=42)["input_ids"].tolist() == [[1] + [3] * 9]
    assert processor().image_token_id == 3


def test_shorter_prompts_are_padded_on_the_left() -> None:
    inputs = processor(14)(images=[image(), image(255)], text=["<image> what is this", "<image> what"])
    assert inputs["input_ids"].tolist() == [[1, 3, 4, 5, 6], [0, 0, 1, 3, 4]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert (inputs["pixel_values"][0] < inputs["pixel_values"][1]).all()


def test_text_alone_and_several_images_in_a_prompt() -> None:
    alone = processor()(text="what is this")
    assert alone["input_ids"].tolist() == [[1, 4, 5, 6]] and "pixel_values" not in alone
    both = processor(14)(images=[image(), image()], text="<image> what <image>")
    assert both["input_ids"].tolist() == [[1, 3, 4, 3]]
    assert both.to("cpu")["pixel_values"].shape == (2, 3, 14, 14)


def test_text_comes_back() -> None:
    assert processor().decode(torch.tensor([4, 5, 2]), skip_special_tokens=True) == "what is"
    assert processor().batch_decode([[4], [6, 2]], skip_special_tokens=True) == ["what", "this"]


@pytest.mark.parametrize(
    ("images", "text", "said"),
    [
        (None, "<image> what", "1 <image> in the text but 0 images"),
        ([image()], "what", "0 <image> in the text but 1 images"),
        ([image()], None, "there is no text"),
        ([image()] * 3, ["<image>", "<image>"], "2 <image> in the text but 3 images"),
    ],
)
def test_mistakes(images: Any, text: Any, said: str) -> None:
    with pytest.raises(ThriftError, match=said):
        processor()(images=images, text=text)
