"""What a shorter text must not lose: code, JSON, tags, tables, links, numbers, negations, quotes, placeholders.

Every finder takes time linear in the length of the text, whatever the text.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..core.errors import ThriftError, did_you_mean
from ..ops.tokens import Span
from .spans import FENCE, NAME, SOLID, sentences


class Protected(NamedTuple):
    """A span of characters that stays as it is, and what it was recognised as."""

    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class Protection:
    """Which kinds of spans are protected, and patterns of the user's own.

    ``Protection.of`` takes what users write: ``"default"`` (every kind below), ``"structure"`` (what programs read:
    all but numbers, negations and quotes), ``"none"``, names of kinds with commas between them, of which a leading
    minus takes one away (``"default,-quote"``), or a list of names and compiled regular expressions. Among them
    ``"whole"`` says what gives way where protected spans alone exceed the target: with it some of them go, whole.
    """

    kinds: tuple[str, ...] = ()
    patterns: tuple[re.Pattern[str], ...] = ()
    whole: bool = False

    @classmethod
    def of(cls, value: Protection | str | Iterable[str | re.Pattern[str]] | None) -> Protection:
        """Read a policy. Raises ThriftError for kinds that do not exist."""
        if isinstance(value, Protection):
            return value
        items = [] if value is None else value.split(",") if isinstance(value, str) else value
        kinds: dict[str, None] = {}
        patterns = []
        whole, alone = False, True
        if not isinstance(items, Iterable):
            raise ThriftError(f"protect takes names of kinds, not {type(value).__name__}: e.g. protect='code,json'")
        for item in items:
            if isinstance(item, re.Pattern) and isinstance(item.pattern, str):
                patterns.append(item)
                continue
            if not isinstance(item, str):
                raise ThriftError(f"protect takes names of kinds and compiled patterns, not {item!r}")
            name = item.strip()
            if name.removeprefix("-") == WHOLE:
                whole = not name.startswith("-")
                continue
            alone = False
            named = PRESETS.get(name.removeprefix("-"), (name.removeprefix("-"),))
            for kind in named:
                if kind not in KINDS:
                    raise ThriftError(f"protect knows no '{kind}': {did_you_mean(kind, [*KINDS, *PRESETS, WHOLE])}")
                kinds.pop(kind, None) if name.startswith("-") else kinds.setdefault(kind)
        if whole and alone and not patterns:
            kinds = dict.fromkeys(PRESETS["default"])
        return cls(tuple(k for k in KINDS if k in kinds), tuple(patterns), whole)

    def __bool__(self) -> bool:
        return bool(self.kinds or self.patterns)

    def find(self, text: str) -> list[Protected]:
        """The protected spans of a text, in order, disjoint; of spans that overlap the union, called as the first.

        Where a number, negation or quote overlaps anything else it is what lies outside of that: a link stays even if
        it is quoted in a sentence that goes.
        """
        found = [Protected(a, b, kind) for kind in self.kinds for a, b in KINDS[kind](text) if a < b]
        found += [Protected(*m.span(), "custom") for p in self.patterns for m in p.finditer(text) if m.group()]
        stays = _joined(p for p in found if p.kind not in OF_A_SENTENCE)
        goes = _joined(p for p in found if p.kind in OF_A_SENTENCE)
        parts = [p._replace(start=a, end=b) for p, a, b in _outside(goes, stays) if text[a:b].strip()]
        return sorted([*stays, *parts])


def _joined(spans: Iterable[Protected]) -> list[Protected]:
    """Spans in order, those that overlap as one."""
    out: list[Protected] = []
    for span in sorted(spans, key=lambda p: (p.start, -p.end)):
        if out and span.start < out[-1].end:
            out[-1] = out[-1]._replace(end=max(out[-1].end, span.end))
        else:
            out.append(span)
    return out


def _outside(spans: Sequence[Any], holes: Sequence[Any]) -> Iterator[tuple[Any, int, int]]:
    """Each span with the start and end of a part of it that lies in no hole; both are in order and disjoint."""
    at = 0
    for span in spans:
        start, end = span[0], span[1]
        while at < len(holes) and holes[at][1] <= start:
            at += 1
        hole = at
        while hole < len(holes) and holes[hole][0] < end:
            if start < holes[hole][0]:
                yield span, start, holes[hole][0]
            start = holes[hole][1]
            hole += 1
        if start < end:
            yield span, start, end


def held(text: str, protected: Sequence[Protected], units: Sequence[Span]) -> list[Protected]:
    """What a choice among these units has to keep: all but what belongs to a sentence that is one unit.

    A number, a negation or a quote means something in its sentence only. Where whole sentences are kept or dropped it
    goes with its own; where less is dropped than a sentence, it stays.
    """
    if not any(p.kind in OF_A_SENTENCE for p in protected):
        return list(protected)
    starts, ends = zip(*sentences(text), strict=True)
    first, last = set(starts), set(ends)
    begins = [start for start, _ in units]
    out = []
    for p in protected:
        at = bisect_right(begins, p.start) - 1
        unit = units[at] if at >= 0 else (0, 0)
        if p.kind not in OF_A_SENTENCE or p.end > unit[1] or unit[0] not in first or unit[1] not in last:
            out.append(p)
    return out


def blocks_of(text: str, protected: Sequence[Protected]) -> list[Span]:
    """Sentences, those joined that a protected span reaches across: what can go without breaking anything.

    Those of :data:`IN_PAIRS` are left out of account.
    """
    left = [p for p in reversed(protected) if p.kind not in IN_PAIRS]
    out: list[Span] = []
    begin = 0
    for _, end in sentences(text):
        while left and left[-1].end <= end:
            left.pop()
        if not left or left[-1].start >= end:
            out.append((begin, end))
            begin = end
    return out


def missing(text: str, protected: Sequence[Protected], kept: Sequence[Span], whole: bool = False) -> list[Protected]:
    """The protected spans that did not survive: they are not in one piece in what was kept, though they should be.

    What belongs to a sentence need not survive where nothing of the sentence did but other protected spans.

    Args:
        text: the text before.
        protected: its protected spans, in order.
        kept: what was kept of it: spans in order.
        whole: others but those of :data:`IN_PAIRS` need not survive either, if nothing of them did.
    """
    starts = [start for start, _ in kept]

    def is_left_out(p: Protected, at: int) -> bool:
        """Whether nothing of it was kept but white space, which what follows it may need."""
        while at < len(kept) and kept[at][0] < p.end:
            if text[max(kept[at][0], p.start) : min(kept[at][1], p.end)].strip():
                return False
            at += 1
        return True

    out = []
    for p in protected:
        at = bisect_right(starts, p.start) - 1
        if at < 0 or p.end > kept[at][1]:
            may_go = whole and p.kind not in (*IN_PAIRS, *OF_A_SENTENCE)
            if not (may_go and is_left_out(p, max(at, 0))):
                out.append(p)
    if not any(p.kind in OF_A_SENTENCE for p in out):
        return out
    bounds = sentences(text)
    begins = [start for start, _ in bounds]
    structure = with_white_space(text, (p for p in protected if p.kind not in OF_A_SENTENCE))
    others = [(start, end) for _, start, end in _outside(kept, structure)]
    other_ends = [end for _, end in others]

    def is_gone(p: Protected) -> bool:
        """Whether nothing else of its sentence (or sentences) was kept."""
        start, end = bounds[bisect_right(begins, p.start) - 1][0], bounds[bisect_left(begins, p.end) - 1][1]
        at = bisect_right(other_ends, start)
        while at < len(others) and others[at][0] < end:
            if text[max(others[at][0], start) : min(others[at][1], end)].strip():
                return False
            at += 1
        return True

    return [p for p in out if p.kind not in OF_A_SENTENCE or not is_gone(p)]


def with_white_space(text: str, spans: Iterable[Protected]) -> list[Span]:
    """The spans with the white space before them, so that what starts a line or a word still does."""
    out: list[Span] = []
    for start, end, _ in spans:
        reached = out[-1][1] if out else 0
        while start > reached and text[start - 1].isspace():
            start -= 1
        out.append((start, end))
    return out


# ---- code, JSON, tags, tables ---------------------------------------------------------------------------------------

_TAG = re.compile(
    r"<(?P<slash>[/?!]?)(?P<name>[A-Za-z][\w:.-]*+)"
    r"""(?:\s(?:"[^"<]{0,1000}+"|'[^'<]{0,1000}+'|[^<>"']){0,1000}+)?+/?>"""
)


def _tags(text: str) -> Iterator[Span]:
    """Tags, not what they enclose; comments and CDATA whole."""
    if "<" not in text:
        return
    yield from (tag.span() for tag in _TAG.finditer(text))
    for opening, closing in (("<!--", "-->"), ("<![CDATA[", "]]>")):
        at = text.find(opening)
        while at >= 0 and (end := text.find(closing, at)) >= 0:
            yield at, end + len(closing)
            at = text.find(opening, end)


_VERBATIM = ("pre", "code", "script", "style", "textarea")


def _code(text: str) -> Iterator[Span]:
    """Fenced blocks (one that is not closed reaches to the end), and what HTML shows verbatim."""
    if "```" in text or "~~~" in text:
        for fence in FENCE.finditer(text):
            yield fence.start(), _line_end(text, fence.start() + len(fence.group().rstrip()))
    if "<" not in text:
        return
    opened: list[tuple[str, int]] = []
    closed: dict[str, list[int]] = {name: [] for name in _VERBATIM}
    for tag in _TAG.finditer(text):
        name = (tag["name"] or "").lower()
        if name in closed and tag["slash"] == "/":
            closed[name].append(tag.end())
        elif name in closed and not tag.group().endswith("/>"):
            opened.append((name, tag.start()))
    reached = 0
    for name, start in opened:
        at = bisect_left(closed[name], start)
        if start >= reached and at < len(closed[name]):
            reached = closed[name][at]
            yield start, reached


def _line_end(text: str, at: int) -> int:
    """Behind the line break that follows, if only blanks come before it: a block ends its line."""
    stop = at
    while stop < len(text) and text[stop] in " \t\r":
        stop += 1
    return stop + 1 if text[stop : stop + 1] == "\n" else at


_INLINE_CODE = re.compile(r"(?<!`)(`{1,3})(?!`)[^\n]{1,500}?(?<!`)\1(?!`)")
_JSON_TOKEN = re.compile(
    r'[ \t\r\n]*+(?:(?P<string>"(?:[^"\\\x00-\x1f]|\\["\\/bfnrtu])*+")'
    r"|(?P<plain>-?(?:0|[1-9]\d*+)(?:\.\d++)?(?:[eE][+-]?\d++)?|true|false|null)"
    r"|(?P<mark>[\[\]{},:]))"
)
_BRACKET = re.compile(r"[\[{]")


def _json(text: str) -> Iterator[Span]:
    """Objects and arrays that are valid JSON, each as large as it can be, in one pass.

    A container that turns out to be none leaves those inside it that were complete by then. What was open when the
    mistake came shares the mistake, so no character is read twice.
    """
    at = 0
    while bracket := _BRACKET.search(text, at):
        at = bracket.start()
        opened: list[tuple[int, bool]] = []  # where each open container starts, and whether it is an object
        complete: list[Span] = []
        state = "value"  # what may come: value, first (or the end), key, first_key (or the end), colon, next
        while True:
            token = _JSON_TOKEN.match(text, at)
            if token is None:
                break
            is_object = bool(opened) and opened[-1][1]
            mark = token["mark"]
            if mark in ("[", "{") and state in ("value", "first"):
                opened.append((token.end() - 1, mark == "{"))
                state = "first_key" if mark == "{" else "first"
            elif mark in ("]", "}") and state in ("next", "first_key" if mark == "}" else "first"):
                if is_object != (mark == "}"):
                    break
                start, _ = opened.pop()
                while complete and complete[-1][0] > start:
                    complete.pop()
                complete.append((start, token.end()))
                state = "next"
            elif mark == "," and state == "next":
                state = "key" if is_object else "value"
            elif mark == ":" and state == "colon":
                state = "value"
            elif token["string"] and state in ("key", "first_key"):
                state = "colon"
            elif (token["string"] or token["plain"]) and state in ("value", "first"):
                state = "next"
            else:
                break
            at = token.end()
            if not opened:
                break
        yield from complete


_ROWS = re.compile(r"(?:^[^\n|]*+\|[^\n]*+(?:\n|\Z))+", re.MULTILINE)
_RULE = re.compile(r"[ \t]*\|?[ \t]*:?-{2,}:?[ \t]*(?:\|[ \t]*:?-{2,}:?[ \t]*)*\|?[ \t]*\r?\n?\Z")


def _tables(text: str) -> Iterator[Span]:
    """Markdown tables: from the line before a rule as far as lines have bars; or lines that all start with a bar."""
    if "|" not in text:
        return
    for rows in _ROWS.finditer(text):
        start = last = rows.start()  # of the lines that start with a bar, and of the last line
        at, barred = start, 0
        for n, line in enumerate(rows.group().splitlines(keepends=True)):
            if n and _RULE.match(line):
                yield (start if barred else last), rows.end()
                barred = 0
                break
            if line.lstrip().startswith("|"):
                start, barred = (start, barred + 1) if barred else (at, 1)
            elif barred:
                if barred > 1:
                    yield start, at
                barred = 0
            last, at = at, at + len(line)
        if barred > 1:
            yield start, rows.end()


# ---- within a line --------------------------------------------------------------------------------------------------

_URL = re.compile(r"(?:\b(?:https?|ftps?|file|s3|gs|wss?|ssh|git)://|\bwww\.)[^\s<>\"`{}|\\^]{1,2000}+", re.IGNORECASE)
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]++@\w[\w-]*+(?:\.[\w-]++)++")
_PLACEHOLDER = re.compile(
    r"\{\{[^{}\n]{1,200}\}\}|\{%[^{}\n]{1,200}%\}|\$\{[^{}\n]{1,200}\}|%\(\w{1,100}\)[a-z]"
    r"|\{(?:\d{1,4}|[A-Za-z_][\w.\[\]]{0,100})(?:![rsa])?(?::[^{}\s]{0,40})?\}"
)
_UNIT = (
    r"(?:%|‰|°[CFK]?|[kcmµnd]?m[²³]?|[kmµ]?g|[mcd]?[lL]|[mµn]?s|(?:[kMG]?W|[kMGT]?H)z?|[kMGTP]i?[Bb]?ps|[kKMGTP]i?[Bb]|[kMGT]?Wh"
    r"|[kKMm]?[VAJNΩ]|[khM]?Pa|[kM]?cal|km/h|m/s|mph|kph|rpm|dpi|px|pt|mi|ft|yd|lbs?|oz|psi|bar|mol|ha|min|hrs?|h"
    r"|secs?|inch(?:es)?|feet|foot|yards?|miles?|met(?:er|re)s?|kilomet(?:er|re)s?|grams?|kilo(?:gram)?s?|tons?|tonnes?"
    r"|lit(?:er|re)s?|pounds?|ounces?|seconds?|minutes?|hours?|days?|weeks?|months?|years?|degrees?|percent|per cent"
    r"|bits?|bytes?|tokens?|euros?|dollars?|cents?|yen|EUR|USD|GBP|JPY|CHF|CNY|INR|thousand|million|billion|trillion|[ap]\.?m\.?|[AP]M)"
)
_MEASURE = re.compile(rf"(?:[ \u00a0\u202f-]?{_UNIT}(?![\w])){{1,2}}|[年月日時时分秒円元个個人次度米克]|公[里斤]")
_NAME = re.compile(NAME)
_DIGIT = re.compile(r"\d")
_BEFORE_NUMBER = "$€£¥₹₩₽#±~≈≤≥<>−-+."


def _numbers(text: str) -> Iterator[Span]:
    """Words with a digit in them, with a sign or currency before and a unit after."""
    if not _DIGIT.search(text):
        return
    for word in _NAME.finditer(text):
        if _DIGIT.search(word.group()):
            start, end = word.span()
            while start and word.end() - start < 100 and text[start - 1] in _BEFORE_NUMBER:
                start -= 1
            unit = _MEASURE.match(text, end)
            yield start, unit.end() if unit else end


_NO = (
    r"(?:no|not|never|none|nor|neither|nobody|nothing|nowhere|cannot|without|except|unless|\w{2,8}n['’]t"
    r"|nicht|kein\w{0,2}|niemals|ohne|pas|jamais|aucune?|sans|nunca|jamás|ning[uú]na?)\b"
)
_NEGATION = re.compile(
    # Of several in a row, as in "not without risk", it is the word behind the last one that is negated.
    rf"(?:\b[\w'’]++[ \t]++(?=not\b))?\b{_NO}(?:[ \t]++{_NO})*+(?:[ \t]++[\w'’-]++)?"
    rf"|[不没沒未无無勿别別][{SOLID}]?|ない|なかった|ません",
    re.IGNORECASE,
)
_QUOTE = re.compile(
    r"""(?<![\w"])"(?=\S)[^"\n]{1,200}(?<=\S)"(?![\w"])|(?<![\w'])'(?=\S)[^'\n]{1,200}(?<=\S)'(?![\w'])"""
    r"|“[^“”\n]{1,200}”|‘[^‘’\n]{1,200}’(?!\w)|„[^„“”\n]{1,200}[“”]|«[^«»\n]{1,200}»|「[^「」\n]{1,200}」|『[^『』\n]{1,200}』"
)


def _matches(pattern: re.Pattern[str]) -> Callable[[str], Iterator[Span]]:
    return lambda text: (m.span() for m in pattern.finditer(text))


def _urls(text: str) -> Iterator[Span]:
    """Links, without the punctuation of the sentence around them."""
    if "://" not in text and "www." not in text.lower():
        return
    for link in _URL.finditer(text):
        start, end = link.span()
        while end > start and (
            text[end - 1] in ".,;:!?'*_"
            or (text[end - 1] == ")" and text.count("(", start, end) < text.count(")", start, end))
            or (text[end - 1] == "]" and text.count("[", start, end) < text.count("]", start, end))
        ):
            end -= 1
        yield start, end


KINDS: dict[str, Callable[[str], Iterable[Span]]] = {
    "code": _code,
    "inline_code": _matches(_INLINE_CODE),
    "json": _json,
    "xml": _tags,
    "table": _tables,
    "url": _urls,
    "email": _matches(_EMAIL),
    "placeholder": _matches(_PLACEHOLDER),
    "number": _numbers,
    "negation": _matches(_NEGATION),
    "quote": _matches(_QUOTE),
}
"""Finders by the name of what they find."""

OF_A_SENTENCE = ("number", "negation", "quote")
"""Kinds that mean something in their sentence only: they go where whole sentences go."""

IN_PAIRS = ("xml", "placeholder")
"""Kinds of which one may open what another, far away, closes: they stay even where others may go, whole."""

PRESETS: dict[str, tuple[str, ...]] = {
    "default": tuple(KINDS),
    "all": tuple(KINDS),
    "structure": tuple(k for k in KINDS if k not in OF_A_SENTENCE),
    "none": (),
}

WHOLE = "whole"
"""What users write beside kinds for protection that never breaks a span, but may drop it."""
