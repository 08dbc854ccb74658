"""The cache folder: one folder per pack and source, complete or absent, each with a `pack.json` that says what."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenthrift.core.errors import ThriftError
from tokenthrift.models.packs.spec import CONVERSION, PackSpec, Source, find, wanted_sources

CACHE_ENV = "TOKENTHRIFT_CACHE"
MANIFEST = "pack.json"
# Configs and tokenizers are hashed again at every load; of the weights only the size is, which costs nothing.
_HASHED_BELOW = 8 * 2**20


def cache_dir() -> Path:
    """Where packs are kept: TOKENTHRIFT_CACHE, else the platform's cache folder (~/.cache/tokenthrift on Linux)."""
    if chosen := os.environ.get(CACHE_ENV):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tokenthrift"


def folder(spec: PackSpec, source: Source) -> Path:
    """The folder that a pack from that source has, whether it is there or not."""
    return cache_dir() / "packs" / spec.name / source


def shipped(spec: PackSpec) -> Path:
    """The folder inside the package with the weights of a pack that comes with it."""
    return Path(str(files("tokenthrift").joinpath("data", spec.name.replace("-", "_"))))


def cached(spec: PackSpec, sources: Iterable[Source]) -> Path | None:
    """The first complete, current copy among `sources`, or None."""
    for source in sources:
        where = folder(spec, source)
        try:
            manifest = read_manifest(where, spec.name)
        except ThriftError:  # absent, or unreadable and so as good as absent: pulling puts it right
            continue
        if manifest.get("conversion") == CONVERSION:
            return where
    return None


def pack_path(name: str, *, source: str | None = None) -> Path:
    """The folder of a pulled pack. Raises ThriftError when the name is unknown or the pack was not pulled yet."""
    spec = find(name)
    where = status(spec, ()).path if spec.encoder else cached(spec, wanted_sources(source))
    if where is None:
        raise ThriftError(f"pack '{name}' is not in {cache_dir()}: run `tokenthrift models pull {name}`")
    return where


@dataclass(frozen=True)
class PackStatus:
    """A pack and the copy of it in the cache, if any; `size` is in bytes, `licence` the copy's or the hub's."""

    name: str
    summary: str
    licence: str
    source: str | None
    path: Path | None
    size: int


def status(spec: PackSpec, sources: Iterable[Source]) -> PackStatus:
    """What the cache holds of a pack; of one that comes with the package, its encoder and the package's own files."""
    if spec.encoder:
        encoder = status(find(spec.encoder), ("wheel",))
        own = sum(file.stat().st_size for file in shipped(spec).iterdir()) if shipped(spec).is_dir() else 0
        size = own + encoder.size if encoder.path else 0
        source = "package" if encoder.path else None
        return PackStatus(spec.name, spec.summary, spec.hub_licence, source, encoder.path and shipped(spec), size)
    where = cached(spec, sources)
    if where is None:
        return PackStatus(spec.name, spec.summary, spec.hub_licence, None, None, 0)
    manifest = read_manifest(where, spec.name)
    size = sum(int(entry["size"]) for entry in manifest["files"].values())
    return PackStatus(spec.name, spec.summary, manifest["licence"], manifest["source"], where, size)


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_files(where: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file of a pack's folder, for its manifest."""
    files = (path for path in sorted(where.rglob("*")) if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(where).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)} for path in files}


def read_manifest(where: Path, name: str) -> dict[str, Any]:
    """A pack's manifest. Raises ThriftError when it cannot be read."""
    try:
        manifest: dict[str, Any] = json.loads((where / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest["files"], dict):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(name, f"{MANIFEST} cannot be read") from error
    return manifest


def verify(where: Path, name: str) -> dict[str, Any]:
    """Check a pack's files against its manifest (all sizes, small files' sha256); return the manifest or raise."""
    manifest = read_manifest(where, name)
    for file, entry in manifest["files"].items():
        path = where / file
        if not path.is_file():
            raise damaged(name, f"{file} is missing")
        size = path.stat().st_size
        if size != entry["size"]:
            raise damaged(name, f"{file} has {size:,} of {entry['size']:,} bytes")
        if size < _HASHED_BELOW and sha256(path) != entry["sha256"]:
            raise damaged(name, f"{file} was changed")
    return manifest


def damaged(name: str, what: str) -> ThriftError:
    """The error for a cached pack that cannot be used."""
    return ThriftError(f"cached pack '{name}' is damaged ({what}): run `tokenthrift models pull {name} --force`")
