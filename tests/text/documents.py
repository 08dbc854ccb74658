"""Made-up documents of which it is known what must survive in them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field

_WORDS = """
the a an our their report team river meeting engine garden customer village reader window system contract evening
quickly slowly often again sent opened reached found carried measured wrote green small public early final steady of
in on with from about under after because while and but or
"""
WORDS = _WORDS.split()
SOLID = "今天天气很好我们去公园看花春夏秋冬東京大阪駅前"


@dataclass
class Document:
    """A text; the strings in it that stand for themselves, and those that belong to a sentence."""

    text: str = ""
    structure: list[str] = field(default_factory=list)
    of_a_sentence: list[str] = field(default_factory=list)
    serial: int = 0  # makes every one of them unique

    def number(self) -> int:
        self.serial += 1
        return 1000 + 7 * self.serial


def document(seed: int, blocks: int = 8) -> Document:
    draw = random.Random(seed)
    doc = Document()
    for _ in range(draw.randint(1, blocks)):
        doc.text += draw.choice((_paragraph, _paragraph, _paragraph, _code, _json, _table, _markup, _solid))(draw, doc)
    return doc


def _prose(draw: random.Random, n: int) -> str:
    return " ".join(draw.choices(WORDS, k=n))


def _paragraph(draw: random.Random, doc: Document) -> str:
    sentences = []
    for _ in range(draw.randint(1, 6)):
        words = _prose(draw, draw.randint(3, 14)).split()
        for _ in range(draw.randint(0, 2)):
            make, kept = draw.choice(INLINE)
            entity = make(draw, doc.number())
            (doc.structure if kept else doc.of_a_sentence).append(entity)
            wrapped = draw.choice(("{}", "{}", "({})", "{},")).format(entity)
            # Not at the end: it might run into the full stop, or the next entity into this one.
            words[draw.randint(0, len(words) - 1) : 0] = [wrapped, draw.choice(WORDS)]
        sentences.append(
            " ".join([words[0][:1].upper() + words[0][1:] if words[0].isalpha() else words[0], *words[1:]])
        )
    ends = draw.choices([". ", "! ", "? ", ".\n"], k=len(sentences))
    return "".join(map("".join, zip(sentences, ends, strict=True))) + draw.choice(("\n", "\n\n", "\r\n"))


INLINE: list[tuple[Callable[[random.Random, int], str], bool]] = [
    (lambda draw, i: f"https://x{i}.example.org/{draw.choice(WORDS)}?q={i}&r=(1)", True),
    (lambda draw, i: f"{draw.choice(WORDS)}.m{i}@mail.example.com", True),
    (lambda draw, i: f"`{draw.choice(WORDS)} = f({i})`", True),
    (lambda draw, i: "{{" + f" user.n{i} | upper " + "}}", True),
    (lambda draw, i: "${VAR_" + str(i) + "}", True),
    (lambda draw, i: "{name" + str(i) + "}", True),
    (lambda draw, i: json.dumps({"id": i, "tags": [draw.choice(WORDS), None, -1.5e3]}), True),
    (lambda draw, i: f'<a href="p{i}.html">', True),
    (lambda draw, i: f"{i} {draw.choice(('km', 'kg', 'euros', 'GB', 'hours'))}", False),
    (lambda draw, i: f"${i},000.50", False),
    (lambda draw, i: f"-{i}.25%", False),
    (lambda draw, i: f"2024-{i}-07", False),
    (lambda draw, i: f"not word{i}", False),
    (lambda draw, i: f"don't name{i}", False),
    (lambda draw, i: f"without item{i}", False),
    (lambda draw, i: f'"{draw.choice(WORDS)} and {draw.choice(WORDS)} n{i}"', False),
    (lambda draw, i: f"“{draw.choice(WORDS)} or n{i}”", False),
]


def _code(draw: random.Random, doc: Document) -> str:
    mark = draw.choice(("```", "~~~"))
    lines = [
        f"{'    ' * draw.randint(0, 2)}x{doc.number()} = [{draw.randint(0, 99)}]  # {_prose(draw, 4)}" for _ in range(3)
    ]
    block = f"{mark}py\n" + "\n".join(lines) + f"\n{mark}\n"
    doc.structure.append(block)
    return block


def _json(draw: random.Random, doc: Document) -> str:
    made = {f"key{doc.number()}": [{"text": _prose(draw, 5), "ok": True}, {}, [], 'a]b}\\" c']}
    block = json.dumps(made, indent=draw.choice((None, 2)))
    doc.structure.append(block)
    return block + "\n"


def _table(draw: random.Random, doc: Document) -> str:
    rows = [f"| {draw.choice(WORDS)} | {doc.number()} |\n" for _ in range(draw.randint(1, 4))]
    block = f"| name{doc.number()} | size |\n|---|--:|\n" + "".join(rows)
    doc.structure.append(block)
    return block + "\n"


def _markup(draw: random.Random, doc: Document) -> str:
    i = doc.number()
    opening, comment = f"<item id=\"n{i}\" class='a > b'>", f"<!-- {_prose(draw, 3)} n{i} -->"
    doc.structure += [opening, comment, f"</item{i}>"]
    return f"{opening}{_prose(draw, 6)}{comment} {_prose(draw, 3)}</item{i}>\n"


def _solid(draw: random.Random, doc: Document) -> str:
    i = doc.number()
    doc.of_a_sentence += [f"{i}公里"]
    return "".join(draw.choices(SOLID, k=12)) + f"，{i}公里" + "".join(draw.choices(SOLID, k=5)) + "。\n"
