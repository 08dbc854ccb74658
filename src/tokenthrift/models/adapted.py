"""Language models with an adapter (LoRA and its kin) merged into their weights. Needs ``peft``."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from ..core.errors import ThriftError


@lru_cache(maxsize=2)
def load_adapted(adapter: str, base: str | None = None) -> tuple[Any, Any]:
    """The base model with an adapter merged into it, and the base model's tokenizer; kept for the next call.

    Args:
        adapter: folder or hub id of what peft saved, as safetensors.
        base: pack, folder or hub id; None = the one that the adapter names.

    Raises:
        ThriftError: peft is not installed, or one of the two cannot be loaded.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise ThriftError("an adapter needs peft: pip install 'tokenthrift[adapters]'") from None
    from .packs.loading import check_finite, folder_of, load

    folder = folder_of(adapter)
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise ThriftError(f"'{adapter}' is no adapter: it needs adapter_config.json and adapter_model.safetensors")
    try:
        named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        model, tokenizer = load(base or str(named))
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload().eval()
    except ThriftError:
        raise
    except Exception as error:  # whatever peft raises for files that do not fit
        raise ThriftError(f"cannot load the adapter '{adapter}': {str(error).splitlines()[0]}") from error
    check_finite(merged, adapter)
    return merged, tokenizer
