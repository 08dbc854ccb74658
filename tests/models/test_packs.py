"""The real packs: what they answer, and that the conversion lost nothing. Downloaded on first use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokenthrift.core.errors import ThriftError
from tokenthrift.models.embeddings import embed
from tokenthrift.models.packs import PACKS, load, pack_path
from tokenthrift.models.saliency import load_saliency_head

pytestmark = pytest.mark.packs

GOLDEN = Path(__file__).parents[1] / "golden" / "dinov2_onnx.json"


@pytest.fixture(autouse=True, scope="module")
def from_wheels() -> Any:
    """The numbers below are the wheels': a hub's SmolLM2 is not quantised and its DINOv2 has no head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENTHRIFT_PACK_SOURCE", "wheel")
        yield


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    return load("smollm2-135m")


@pytest.fixture(scope="module")
def minilm() -> tuple[Any, Any]:
    return load("minilm-l6")


@pytest.fixture(scope="module")
def dinov2() -> tuple[Any, Any]:
    return load("dinov2-s")


def test_smollm2_answers(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_smollm2_is_what_it_says(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float32 and not model.training
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192


TEXTS = [
    "  Hello,\n\n\tworld!  ",
    "def f(x):\n    return x**2  # 2024-01-31, it's 3.14\r\n",
    "naïve 日本語 🎉👩‍👩‍👧 Ωμέγα\u00a0\u200b ½²",
    "don't  stop . , ! <b>&amp;</b>",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_tokenizer_round_trips_with_spans(smollm2: tuple[Any, Any], text: str) -> None:
    _, tokenizer = smollm2
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(encoded.input_ids) == text
    end = 0
    for token, (start, stop) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
        piece = tokenizer.decode([token])
        # A character cut over several byte tokens belongs to each of them; every other token is exactly its span.
        assert piece == text[start:stop] or "\ufffd" in piece
        assert start <= end <= stop
        end = stop
    assert end == len(text), "the spans cover the text"


def test_smollm2_splits_digits(smollm2: tuple[Any, Any]) -> None:
    """The published tokenizer does, and a GGUF conversion forgets it."""
    _, tokenizer = smollm2
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]


def test_minilm_embeddings(minilm: tuple[Any, Any]) -> None:
    model, tokenizer = minilm
    # The first sentence is the model card's example; other implementations publish these same numbers for it.
    rows = embed(["This is an example sentence", "A cat sits on the mat.", "The kitten is on the rug."], *minilm)
    assert rows.shape == (3, 384)
    assert rows.norm(dim=1) == pytest.approx(1)
    assert rows[0, :4].tolist() == pytest.approx([0.06765693, 0.06349593, 0.04871314, 0.07930495], abs=2e-6)
    alike = rows @ rows.T
    assert alike[1, 2] > 0.5 > 0.3 > alike[0, 1]
    assert not model.training and tokenizer.is_fast


def test_embedding_does_not_depend_on_the_batch(minilm: tuple[Any, Any]) -> None:
    texts = ["word " * n for n in (40, 1, 300, 7, 2)]
    together, alone = embed(texts, *minilm, batch_size=2), torch.cat([embed([text], *minilm) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)
    assert embed([], *minilm).shape == (0, 384)
    with pytest.raises(ThriftError, match="list of strings"):
        embed("one string", *minilm)


def computed_image() -> np.ndarray:
    """The picture that benchmarks/check_dinov2_onnx.py gave ONNX Runtime."""
    y, x = np.mgrid[0:224, 0:224]
    blue = np.where((x // 8) % 2 == 0, 60, 180)
    disc = (x - 90) ** 2 + (y - 120) ** 2 < 45**2
    gradient = np.stack([x * 255 // 223, y * 255 // 223, blue], -1)
    return np.where(disc[..., None], [250, 240, 60], gradient).astype(np.uint8)


@torch.inference_mode()
def test_dinov2_and_its_head_equal_onnx_runtime(dinov2: tuple[Any, Any]) -> None:
    model, processor = dinov2
    golden = json.loads(GOLDEN.read_text())
    features = model(**processor(computed_image())).last_hidden_state
    assert features.shape == (1, 257, 384)
    saliency = load_saliency_head()(features)
    assert saliency.shape == (1, 224, 224)
    assert np.abs(features[0, ::32, ::48].numpy() - golden["features"]).max() < 1e-4
    assert np.abs(saliency[0, ::32, ::32].numpy() - golden["saliency"]).max() < 2e-5
    assert saliency[0, 120, 90] > 2 * saliency[0, :20, 200:].mean(), "the disc draws the eye"


@torch.inference_mode()
def test_saliency_per_token_and_on_oblong_grids(dinov2: tuple[Any, Any]) -> None:
    model, processor = dinov2
    pixels = processor(np.zeros((100, 200, 3), np.uint8), fit="aspect")["pixel_values"]
    assert pixels.shape == (1, 3, 112, 224)
    features, head = model(pixels).last_hidden_state, load_saliency_head()
    assert head(features, grid=(8, 16)).shape == (1, 112, 224)
    assert head(features, grid=(8, 16), size=(8, 16)).shape == (1, 8, 16)
    with pytest.raises(ThriftError, match="128 patch tokens are no 11x11 grid"):
        head(features)


def test_hub_copies_have_no_head(tmp_path: Path) -> None:
    with pytest.raises(ThriftError, match="TOKENTHRIFT_PACK_SOURCE=wheel"):
        load_saliency_head(tmp_path)


@pytest.mark.parametrize("name", sorted(name for name, spec in PACKS.items() if not spec.encoder))
def test_manifest(name: str, smollm2: Any, minilm: Any, dinov2: Any) -> None:
    manifest = json.loads((pack_path(name) / "pack.json").read_text())
    assert manifest["licence"] == PACKS[name].wheel_licence
    assert manifest["origin"]["wheel"] == PACKS[name].wheel
    assert manifest["versions"]["torch"]
    assert {"config.json", "model.safetensors"} <= set(manifest["files"])
