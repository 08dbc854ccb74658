"""Passages of real text to learn from: text files, and the documentation that installed packages carry."""

from __future__ import annotations

import ast
import gzip
import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files, metadata
from pathlib import Path

from tokenthrift.core.errors import ThriftError
from tokenthrift.text.files import read_text

TESTS = re.compile(r"(^|/)_?tests?(/|ing)|conftest|vendor")
SHORTEST = 400
"""Characters of a documentation string that are worth reading."""


@dataclass(frozen=True)
class Text:
    """A document, and where it is from."""

    source: str
    text: str


def from_file(path: Path) -> list[Text]:
    """A text file, plain or gzipped; a file of the Jargon File's kind (entries that begin with ``:``) is one text."""
    if not path.is_file():
        raise ThriftError(f"there is no file {path}: give text files, or packages by name")
    if path.suffix == ".gz":
        return [Text(path.name, gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))]
    return [Text(path.name, read_text(path))]


def from_package(name: str) -> list[Text]:
    """The long description of an installed distribution and the documentation strings of its modules.

    Raises:
        ThriftError: it is not installed.
    """
    try:
        about = metadata(name)
    except PackageNotFoundError:
        raise ThriftError(f"the package {name} is not installed: install it, or name another") from None
    # Recent releases of Python keep the description apart, older ones have it as the message's body.
    described = about["Description"] or about.get_payload()  # type: ignore[attr-defined]
    found = [Text(f"{name}/description", str(described))] if described else []
    for file in files(name) or ():
        if str(file).endswith(".py") and not TESTS.search(str(file)):
            found += [Text(f"{name}/{file}", text) for text in docstrings(Path(str(file.locate())))]
    return found


def docstrings(path: Path) -> Iterator[str]:
    """The long documentation strings of a source file, without their indentation."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= SHORTEST:
                yield text


def passages(texts: Sequence[Text], count: int, chars: int, seed: int) -> list[Text]:
    """Passages of about ``chars`` characters that begin with a paragraph; none is repeated.

    Half of them are from files, half from packages, where both are given; sources of a kind have equal shares.

    The same texts, numbers and seed give the same passages. Lines are unwrapped in every other passage, as people
    paste text of both kinds.
    """
    draw = random.Random(seed)
    by_source: dict[str, list[Text]] = {}
    for text in texts:
        by_source.setdefault(text.source.split("/")[0], []).append(text)
    for group in by_source.values():
        draw.shuffle(group)
    found: list[Text] = []
    seen: set[str] = set()
    tries = 0
    while by_source and len(found) < count and tries < 50 * count:
        tries += 1
        kinds = sorted({"/" in text.source for group in by_source.values() for text in group[:1]})
        kind = kinds[tries % len(kinds)]
        source = draw.choice(sorted(s for s, group in by_source.items() if ("/" in group[0].source) == kind))
        text = draw.choice(by_source[source])
        start = draw.randrange(max(len(text.text) - chars, 1))
        start = text.text.find("\n\n", start) + 2 if start and "\n\n" in text.text[start:] else 0
        piece = text.text[start : start + chars].strip()
        if len(found) % 2:
            piece = unwrapped(piece)
        mark = hashlib.sha256(re.sub(r"\s+", " ", piece[:200]).encode()).hexdigest()
        letters = sum(c.isalpha() for c in piece)
        if mark in seen or len(piece) < SHORTEST or letters < 0.6 * len(piece):
            continue
        seen.add(mark)
        found.append(Text(text.source, piece))
    return found


def unwrapped(text: str) -> str:
    """Paragraphs on one line each, where lines look like prose."""
    return re.sub(r"(?<=[\w,;.])\n[ \t]*(?=[a-z(])", " ", text)
