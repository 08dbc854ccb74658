"""SmolLM2-135M-Instruct: GGUF Q4_1 → safetensors, and a tokenizer that splits text as the published one does.

The weights are stored as float32 (about 538 MB), measured against float16 (269 MB): float16 rounds 42% of the
dequantised values (Q4_1 gives d·q + m, two float16 numbers combined), which moves the logits by up to 0.06 and the most
likely next token once in a thousand; it also loads slower (0.3–1.2 s instead of 0.2 s), because it has to be widened
again while float32 is only mapped into memory. So float32 is exact and fast, and the price is disk.
"""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

CONTEXT = 8192


def convert(source: Path, out: Path) -> None:
    """Write config, float32 weights and tokenizer of the one .gguf file in `source` into the pack folder `out`."""
    gguf = next(source.glob("*.gguf")).name
    _weights(source, gguf, out)
    _tokenizer(source, gguf, out)


def _weights(source: Path, gguf: str, out: Path) -> None:
    import accelerate  # noqa: F401  (both are asked for here so that a missing one is an ImportError, said plainly)
    import gguf as _  # noqa: F401
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with redirect_stderr(io.StringIO()):  # its progress bar cannot be switched off
        model: Any = AutoModelForCausalLM.from_pretrained(str(source), gguf_file=gguf, dtype=torch.float32)
    # Not save_pretrained: it refuses models that came from a GGUF, although these weights are plain tensors by now.
    # The output head is the embedding (tied), so it is not stored twice.
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_diff_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    _write_json(out / "config.json", config | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"})
    model.generation_config.save_pretrained(out)


def _tokenizer(source: Path, gguf: str, out: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(source), gguf_file=gguf)
    backend = tokenizer.backend_tokenizer
    # The GGUF names its pre-tokenizer ("smollm": every digit on its own, then GPT-2's rule) and the conversion knows
    # only GPT-2's rule. Without the digits "2024" would become one token that the model hardly ever saw.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": tokenizer.chat_template,
    }
    _write_json(out / "tokenizer_config.json", settings)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
