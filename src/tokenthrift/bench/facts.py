"""Questions about real documents, made by rule, whose answers are in the text: was the answer kept?

The documents come with Python (© Python Software Foundation, PSF License): the topics of its help, and the docstrings
of its standard library. They differ a little from version to version; the same Python makes the same questions.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from ..core.errors import ThriftError
from ..text.protect import Protection
from ..text.spans import DETERMINERS, FUNCTION_WORDS, sentences

KINDS = ("is", "does", "returns", "number")
"""What something is, what something does, what a function returns (its name is not in the sentence with the answer);
and answers with a digit, such as versions, which are protected by default."""

_STANDARD_LIBRARY = """
argparse array ast asyncio base64 binascii bisect calendar cmath codecs collections configparser contextlib
copy csv datetime decimal difflib dis email.utils enum filecmp fileinput fnmatch fractions functools getpass
gettext glob gzip heapq hmac html http.client imaplib inspect io ipaddress itertools json linecache locale
logging mailbox math mimetypes numbers operator os os.path pathlib pickle pkgutil platform plistlib posixpath
pprint queue random re reprlib sched secrets selectors shelve shlex shutil signal smtplib socket sqlite3 ssl
stat statistics string struct subprocess symtable sysconfig tarfile tempfile textwrap threading time timeit
tokenize traceback types typing unicodedata unittest urllib.parse urllib.request uuid warnings wave weakref
webbrowser xml.dom.minidom xml.etree.ElementTree zipfile zlib zoneinfo
"""
_MODULES = _STANDARD_LIBRARY.split()


class Question(NamedTuple):
    """``answer`` is in the passage once, and not in the question; ``kind`` is one of :data:`KINDS`."""

    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Passage:
    """Consecutive paragraphs of one document, and the questions about them."""

    name: str
    text: str
    questions: tuple[Question, ...]


def fact_questions(
    count: int, tokens: int, size: Callable[[str], int], seed: int = 0, per_passage: int = 3
) -> list[Passage]:
    """Passages with ``count`` questions in all, the kinds in equal shares as far as there are enough.

    A passage that is asked about already comes before others, so that there are few to shorten.

    Args:
        count: of questions.
        tokens: of a passage, at most; at least two thirds of it.
        size: tokens of a text.
        seed: of the draw.
        per_passage: questions about one passage, at most.

    Raises:
        ThriftError: there are fewer questions than that.
    """
    draw = random.Random(seed)
    found: list[tuple[int, Question]] = []
    pieces = [piece for name, paragraphs in documents() for piece in _pieces(name, paragraphs, tokens, size)]
    for i, (_, text) in enumerate(pieces):
        found += [(i, question) for question in questions(text)]
    draw.shuffle(found)

    taken: dict[int, list[Question]] = {}
    by_kind = {kind: [item for item in found if item[1].kind == kind] for kind in KINDS}
    total = 0
    while total < count and any(by_kind.values()):
        for left in by_kind.values():
            if not left or total == count:
                continue
            again = [item for item in left if 0 < len(taken.get(item[0], ())) < per_passage]
            i, question = item = again[-1] if again else left[-1]
            left.remove(item)
            asked = taken.setdefault(i, [])
            if len(asked) < per_passage:
                asked.append(question)
                total += 1
    if total < count:
        raise ThriftError(f"the documents of this Python make {total} such questions, not {count}: ask for fewer")
    return [Passage(*pieces[i], tuple(asked)) for i, asked in sorted(taken.items()) if asked]


def answered(text: str, answer: str) -> bool:
    """Whether the answer is in the text: its words one after the other, whatever their case, articles left out."""
    return f" {normalised(answer)} " in f" {normalised(text)} "


def normalised(text: str) -> str:
    """Words in lower case with one blank between them; no marks, no articles."""
    return " ".join(word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the"))


# ---- the documents --------------------------------------------------------------------------------------------------


@cache
def documents() -> list[tuple[str, list[str]]]:
    """Names and paragraphs, each paragraph in one line: topics without their code, and what modules define."""
    from pydoc_data.topics import topics

    found = [(f"python/{name}", list(_prose(topics[name]))) for name in sorted(topics)]
    seen: set[str] = set()  # what one module takes from another is described once
    for name in _MODULES:
        try:
            module = import_module(name)
        except ImportError:  # not built into this Python
            continue
        found.append((f"{name} (docstrings)", list(_members(name, module, seen))))
    return found


def _prose(text: str) -> Iterator[str]:
    """Paragraphs that are neither code nor headings nor lists; the head of a definition stands before its first one."""
    head = ""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        line = " ".join(paragraph.split())
        if re.fullmatch(r"[\w.]+\([^()]*\)", line):
            head = f"{line}\n"
        elif (
            re.match(r"[A-Z\"*]", line)
            and line.endswith((".", ":"))
            and line.count(" ") > 4
            and _MARKS.isdisjoint(line)
        ):
            yield head + line
            head = ""


_MARKS = frozenset("=<>{}|~\\")
"""Signs of code and headings."""


def _members(name: str, owner: Any, seen: set[str]) -> Iterator[str]:
    """The public functions and classes of a module, or methods of a class, with what their docstrings say first."""
    for key, value in sorted(vars(owner).items()):
        doc = getattr(value, "__doc__", None)
        if key.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)) or not isinstance(doc, str):
            continue
        if key + doc in seen:
            continue
        seen.add(key + doc)
        if said := list(_prose(doc))[:3]:
            yield f"{name}.{key}{_signature(value)}\n{' '.join(said)}"
        if inspect.isclass(value) and value.__module__ == name and not inspect.isclass(owner):
            yield from _members(f"{name}.{key}", value, seen)


def _signature(value: Any) -> str:
    try:
        signature = str(inspect.signature(value))
    except (ValueError, TypeError):
        return "(...)"
    return "(...)" if len(signature) > 60 or "<" in signature else signature


def _pieces(name: str, paragraphs: Sequence[str], tokens: int, size: Callable[[str], int]) -> Iterator[tuple[str, str]]:
    """Consecutive paragraphs of ``tokens`` tokens at most, and two thirds of them at least."""
    text, number = "", 0
    for paragraph in [*paragraphs, ""]:
        more = f"{text}\n\n{paragraph}" if text else paragraph
        if paragraph and size(more) <= tokens:
            text = more
            continue
        if size(text) >= tokens * 2 / 3:
            yield f"{name}#{number}", text
            number += 1
        text = paragraph if size(paragraph) <= tokens else ""


# ---- the questions --------------------------------------------------------------------------------------------------

_THIRD_PERSON = """
returns raises means represents denotes causes creates defines accepts takes provides contains holds controls
describes yields indicates implements produces allows requires supports uses calls stores replaces performs
reads writes removes adds computes generates checks converts gives makes
"""
_IRREGULAR = {"specifies": "specify", "has": "have", "passes": "pass", "matches": "match"}
_VERBS = {verb: verb.removesuffix("s") for verb in _THIRD_PERSON.split()} | _IRREGULAR
_THING = r"""["'*`]*[A-Za-z_][^\s,;:.()]*"""
_SUBJECT = rf"(?P<subject>(?:The |A |An |Each |Every )?{_THING}(?: {_THING}){{0,4}}?(?:\(\)[\"'*`]*)?)"
_IS = re.compile(rf"{_SUBJECT} (?P<verb>is|are) (?P<rest>(?:an? |the |one of ).+)")
_DOES = re.compile(rf"{_SUBJECT} (?P<verb>{'|'.join(_VERBS)}) (?P<rest>.+)")
_VERSION = re.compile(
    r"(?P<what>Changed|Added|New|Deprecated) in version (?P<version>\d+\.\d+(?:\.\d+)?): (?P<rest>.{20,})"
)
_RETURNS = re.compile(r"(?P<name>[\w.]+)\([^\n]*\)[^\n]*\n(?P<rest>Returns? .+)")
_NO_SUBJECT = """
it this that these those they there he she we you i if when while as for in on at by with to and or but so
then note value what which who both some any all most many other one since because although however otherwise
also only even see below above usually
"""
_VAGUE = frozenset(_NO_SUBJECT.split())
_WITHIN = frozenset(("of", "for"))


def questions(text: str) -> Iterator[Question]:
    """All questions that can be made of a passage: each has its answer in one place, and does not tell it."""
    spans = [text[start:end].strip() for start, end in sentences(text)]
    made = [question for sentence in spans for question in _asked(sentence)]
    for found in _RETURNS.finditer(text):
        said = re.sub(r"^Returns? (?:whether )?", "", found["rest"])
        made.append(Question(f"What does {found['name']} return?", _phrase(said), "returns"))
    everything = f" {normalised(text)} "
    asked: set[str] = set()
    for question in made:
        answer = normalised(question.answer)
        told = f" {answer} " in f" {normalised(question.text)} "
        if answer and not told and everything.count(f" {answer} ") == 1 and question.text not in asked:
            asked.add(question.text)
            numbers = Protection(("number",)).find(question.answer)
            yield question._replace(kind="number") if numbers else question


def _asked(sentence: str) -> Iterator[Question]:
    if found := _VERSION.match(sentence):
        rest = " ".join(found["rest"].split()[:12]).rstrip(".,:;")
        yield Question(f"In which version was this {found['what'].lower()}: {rest}?", found["version"], "number")
        return
    for pattern, kind in ((_IS, "is"), (_DOES, "does")):
        found = pattern.match(sentence)
        if found is None or set(found["subject"].lower().split()) & _VAGUE:
            continue
        subject = found["subject"]
        if subject.split()[0].lower() in DETERMINERS:
            subject = subject[0].lower() + subject[1:]
        verb = found["verb"]
        text = f"What {verb} {subject}?" if kind == "is" else f"What does {subject} {_VERBS[verb]}?"
        yield Question(text, _phrase(found["rest"]), kind)


def _phrase(text: str, longest: int = 4) -> str:
    """The noun phrase that a text begins with, without its article: up to ``longest`` words, or none."""
    words: list[str] = []
    for word in re.sub(r"^(?:one of |an? |the |this |its |their )+", "", text, flags=re.IGNORECASE).split():
        bare = word.strip("\"'*`(),;:.")
        function = bare.lower() in FUNCTION_WORDS or bare.lower() in DETERMINERS
        if not bare or (function and (bare not in _WITHIN or not words)):
            break
        words.append(word)
        if word[-1] in ",;:.)" or len(words) == longest:
            break
    while words and (words[-1] in _WITHIN or (len(words) > 1 and words[-1].endswith(("ing", "ed")))):
        words.pop()
    return " ".join(words).strip("\"'*`(),;:.")
