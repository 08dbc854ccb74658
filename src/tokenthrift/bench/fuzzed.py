"""Made-up documents of which it is known what must survive in them: real prose, and what programs read in between.

The prose is that of Python's own help (© Python Software Foundation, PSF License). Where everything stands is noted as
a document is written, so that what a shorter text broke is found without the library's own finders.
"""

from __future__ import annotations

import json
import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from ..ops.tokens import Span
from ..text.spans import merged

OF_A_SENTENCE = ("number", "negation", "quote")
"""Kinds that may go, but only with all else of their sentence."""


class Planted(NamedTuple):
    """A span that has to survive, by a kind that ``protect=`` knows."""

    start: int
    end: int
    kind: str


@dataclass
class Fuzzed:
    """A document: its text, what was planted in it, and its sentences of prose, all in order."""

    text: str = ""
    planted: list[Planted] = field(default_factory=list)
    sentences: list[Span] = field(default_factory=list)
    serial: int = 0

    def add(self, text: str, kind: str = "") -> None:
        """Write on; with a kind what is written has to survive."""
        if kind:
            self.planted.append(Planted(len(self.text), len(self.text) + len(text), kind))
        self.text += text

    def number(self) -> int:
        """Another one every time, so that nothing that is planted is there twice."""
        self.serial += 1
        return 1000 + 7 * self.serial


def fuzzed(seed: int, blocks: int = 8) -> Fuzzed:
    """The document of this seed, of one block at least and ``blocks`` at most."""
    draw = random.Random(seed)
    doc = Fuzzed()
    for _ in range(draw.randint(1, blocks)):
        draw.choice((_paragraph, _paragraph, _paragraph, _code, _json, _table, _markup, _solid))(draw, doc)
    return doc


def broken(doc: Fuzzed, kept: Sequence[Span], kinds: Collection[str]) -> Counter[str]:
    """How many of what was planted a shorter text broke, by kind.

    Structure is broken if it is not there in one piece. A number, a negation or a quote is broken if it is not, though
    a word of its sentence is.

    Args:
        doc: the document.
        kept: what was kept of its text.
        kinds: which kinds were protected.
    """
    spans = merged(sorted(kept))
    starts = [start for start, _ in spans]
    out: Counter[str] = Counter()
    for planted in doc.planted:
        at = bisect_right(starts, planted.start) - 1
        whole = at >= 0 and planted.end <= spans[at][1]
        if planted.kind in kinds and not whole and (planted.kind not in OF_A_SENTENCE or _torn(doc, planted, spans)):
            out[planted.kind] += 1
    return out


def _torn(doc: Fuzzed, planted: Planted, kept: Sequence[Span]) -> bool:
    """Whether a word of the sentence is kept that is no part of what stands for itself."""
    start, end = next(span for span in doc.sentences if span[0] <= planted.start < span[1])
    left = {i for a, b in kept for i in range(max(a, start), min(b, end))}
    for other in doc.planted:
        if other.kind not in OF_A_SENTENCE:
            left.difference_update(range(other.start, other.end))
    return any(doc.text[i].isalnum() for i in left)


# ---- blocks ---------------------------------------------------------------------------------------------------------


@cache
def prose() -> tuple[str, ...]:
    """Plain sentences: words, commas, and a full stop."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    found = re.findall(r"(?<=[.:] )[A-Z][a-z]+(?:,? [a-z]{2,}){4,18}\.(?= [A-Z])", text)
    return tuple(dict.fromkeys(found))


def _words(draw: random.Random, n: int) -> str:
    words = re.findall(r"\b[a-z]{2,}", draw.choice(prose()))
    return " ".join(draw.choices(words, k=n))


def _paragraph(draw: random.Random, doc: Fuzzed) -> None:
    for _ in range(draw.randint(1, 6)):
        words = draw.choice(prose())[:-1].split()
        # Not at the ends, where it might run into the full stop, and never two in one place.
        places = draw.sample(range(1, len(words)), k=min(draw.randint(0, 2), len(words) - 1))
        start = len(doc.text)
        for i, word in enumerate(words):
            doc.add(f" {word}" if i else word)
            if i in places:
                make, kind = draw.choice(INLINE)
                before, after = draw.choice((("", ""), ("", ""), ("(", ")"), ("", ",")))
                doc.add(f" {before}")
                doc.add(make(draw, doc.number()), kind)
                # A word of its own between what is planted and the next one.
                doc.add(f"{after} {_words(draw, 1)}")
        doc.sentences.append((start, len(doc.text)))
        doc.add(draw.choice((". ", "! ", "? ", ".\n")))
    doc.add(draw.choice(("\n", "\n\n", "\r\n")))


INLINE: list[tuple[Callable[[random.Random, int], str], str]] = [
    (lambda draw, i: f"https://x{i}.example.org/{_words(draw, 1)}?q={i}&r=(1)", "url"),
    (lambda draw, i: f"{_words(draw, 1)}.m{i}@mail.example.com", "email"),
    (lambda draw, i: f"`{_words(draw, 1)} = f({i})`", "inline_code"),
    (lambda draw, i: "{{" + f" user.n{i} | upper " + "}}", "placeholder"),
    (lambda draw, i: "${VAR_" + str(i) + "}", "placeholder"),
    (lambda draw, i: "{name" + str(i) + "}", "placeholder"),
    (lambda draw, i: f"%(n{i})s", "placeholder"),
    (lambda draw, i: json.dumps({"id": i, "tags": [_words(draw, 1), None, -1.5e3]}), "json"),
    (lambda draw, i: f'<a href="p{i}.html">', "xml"),
    (lambda draw, i: f"{i} {draw.choice(('km', 'kg', 'euros', 'GB', 'hours'))}", "number"),
    (lambda draw, i: f"${i},000.50", "number"),
    (lambda draw, i: f"-{i}.25%", "number"),
    (lambda draw, i: f"2024-{i}-07", "number"),
    (lambda draw, i: f"v{i}.2.3", "number"),
    (lambda draw, i: f"not word{i}", "negation"),
    (lambda draw, i: f"don't name{i}", "negation"),
    (lambda draw, i: f"without item{i}", "negation"),
    (lambda draw, i: f'"{_words(draw, 2)} n{i}"', "quote"),
    (lambda draw, i: f"“{_words(draw, 2)} n{i}”", "quote"),
    (lambda draw, i: f"'{_words(draw, 2)} n{i}'", "quote"),
]


def _code(draw: random.Random, doc: Fuzzed) -> None:
    lines = [
        f"{'    ' * draw.randint(0, 2)}x{doc.number()} = [{draw.randint(0, 99)}]  # {_words(draw, 4)}" for _ in range(3)
    ]
    opening, closing = draw.choice((("```py\n", "\n```\n"), ("~~~py\n", "\n~~~\n"), ("<pre>", "</pre>")))
    doc.add(opening + "\n".join(lines) + closing, "code")
    doc.add("\n")


def _json(draw: random.Random, doc: Fuzzed) -> None:
    made = {f"key{doc.number()}": [{"text": _words(draw, 5), "ok": True}, {}, [], 'a]b}\\" c']}
    doc.add(json.dumps(made, indent=draw.choice((None, 2))), "json")
    doc.add("\n")


def _table(draw: random.Random, doc: Fuzzed) -> None:
    rows = [f"| {_words(draw, 1)} | {doc.number()} |\n" for _ in range(draw.randint(1, 4))]
    doc.add(f"| name{doc.number()} | size |\n|---|--:|\n" + "".join(rows), "table")
    doc.add("\n")


def _markup(draw: random.Random, doc: Fuzzed) -> None:
    i = doc.number()
    doc.add(f"<item id=\"n{i}\" class='a > b'>", "xml")
    doc.add(_words(draw, 6))
    doc.add(f"<!-- {_words(draw, 3)} n{i} -->", "xml")
    doc.add(" " + _words(draw, 3))
    doc.add(f"</item{i}>", "xml")
    doc.add("\n")


SOLID = "今天天气很好我们去公园看花春夏秋冬東京大阪駅前"


def _solid(draw: random.Random, doc: Fuzzed) -> None:
    start = len(doc.text)
    doc.add("".join(draw.choices(SOLID, k=12)) + "，")
    doc.add(f"{doc.number()}公里", "number")
    doc.add("".join(draw.choices(SOLID, k=5)))
    doc.sentences.append((start, len(doc.text)))
    doc.add("。\n")
