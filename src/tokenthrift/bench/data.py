"""What to measure on: real text that comes with Python, the shipped photographs, or the user's own files."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from ..core.errors import ThriftError
from ..text.files import read_text

IMAGES = {".jpg", ".jpeg", ".png", ".webp"}
PROMPTS = {".jsonl", ".ndjson"}
TEXTS = {".txt", ".md", ".rst"}
"""Texts that are found in folders; a file that is named itself is read as text whatever its name."""

DEFAULT_SOURCE = (
    "The Python documentation (pydoc_data.topics) and source files of Python's standard library, "
    "© Python Software Foundation, PSF License; photographs in the public domain or CC0 (see data/images/LICENSE.md); "
    "scenes of Fashion-MNIST items (© Zalando SE, MIT License) on such photographs."
)

# Long enough for several prompts, prose or code rather than tables.
_TOPICS = (
    "compound", "specialnames", "types", "formatstrings", "execmodel", "import", "debugger", "customization",
    "assignment", "comparisons", "naming", "function", "objects", "calls", "try", "attribute-access",
)  # fmt: skip
_MODULES = ("textwrap", "fnmatch", "shlex", "heapq", "bisect", "string", "colorsys", "cmd", "glob", "stat")


@dataclass(frozen=True)
class Document:
    """A text that is split into a prompt and its held-back continuation."""

    name: str
    text: str


@dataclass(frozen=True)
class Prompt:
    """A prompt of the user's, with the answer if it is known."""

    name: str
    text: str
    answer: str | None = None


@dataclass(frozen=True)
class Data:
    """All there is to measure on. ``code`` holds source files, from which edit prompts are made; ``scenes`` says that
    questions about the shipped scenes belong to it."""

    source: str
    documents: tuple[Document, ...] = ()
    code: tuple[Document, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    images: tuple[Path, ...] = field(default=())
    scenes: bool = False


def default_data() -> Data:
    """Text that is on every machine that has Python; nothing is downloaded."""
    from pydoc_data.topics import topics

    photographs = Path(str(files("tokenthrift").joinpath("data/images")))
    return Data(
        source=DEFAULT_SOURCE,
        documents=tuple(Document(f"python/{name}", topics[name]) for name in _TOPICS if name in topics),
        code=tuple(doc for name in _MODULES if (doc := _module(name)) is not None),
        images=tuple(sorted(p for p in photographs.iterdir() if p.suffix in IMAGES)),
        scenes=True,
    )


def load_data(paths: Sequence[str | Path]) -> Data:
    """The user's files: text and Markdown (split into prompt and continuation), JSONL of prompts, images.

    A folder stands for all images, text and Markdown files in it and below, in the order of their paths; not for its
    JSONL files, which may be anything, results of ours included.
    A JSONL line is an object with ``prompt`` and, if known, ``answer``. Raises ThriftError, one line, for what cannot
    be used: a missing, empty or binary file, a folder without any, or an invalid line, which is named by its number.
    """
    documents: list[Document] = []
    prompts: list[Prompt] = []
    images: list[Path] = []
    for path, name in names(file for given in paths for file in _files(Path(given))).items():
        if path.suffix.lower() in IMAGES:
            images.append(_image(path))
            continue
        text = read_text(path).replace("\r\n", "\n")
        if path.suffix.lower() in PROMPTS:
            prompts += _prompts(name, text)
        else:
            documents.append(Document(name, text))
    source = "The user's own: " + ", ".join(Path(p).name for p in paths)
    return Data(source, tuple(documents), prompts=tuple(prompts), images=tuple(images))


def _files(path: Path) -> list[Path]:
    """A file, or what a folder holds of the kinds that are read."""
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES | TEXTS and p.is_file())
    if not found:
        raise ThriftError(f"the folder {path} holds no files that end in {', '.join(sorted(IMAGES | TEXTS))}")
    return found


def _module(name: str) -> Document | None:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        return None
    return Document(f"{name}.py", Path(spec.origin).read_text(encoding="utf-8"))


def names(paths: Iterable[Path]) -> dict[Path, str]:
    """A short name for every file: its own where that tells it from the others, else its path. Drops duplicates."""
    paths = list(dict.fromkeys(paths))
    plain = [path.name for path in paths]
    return {path: path.name if plain.count(path.name) == 1 else str(path) for path in paths}


def _prompts(name: str, text: str) -> Iterable[Prompt]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ThriftError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(item, dict) or not isinstance(item.get("prompt"), str) or not item["prompt"].strip():
            raise ThriftError(f'{where}: needs an object with a text "prompt", such as {{"prompt": "..."}}')
        answer = item.get("answer")
        if answer is not None and (not isinstance(answer, str) or not answer.strip()):
            raise ThriftError(f'{where}: "answer" must be text that is not empty, or left out')
        yield Prompt(f"{name}:{number}", item["prompt"], answer)


def _image(path: Path) -> Path:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError) as error:
        raise ThriftError(f"cannot read the image {path}: {error}") from None
    return path
