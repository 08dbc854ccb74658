"""Spans of characters: words, phrases and sentences of a text, and their way to and from token maps.

``words``, ``phrases`` and ``sentences`` tile the text: every character is in exactly one span, so that keeping all
spans gives the text back, and keeping some gives nothing that the text does not contain. No language model, no
dictionary but a short list of English function words: what is assumed is said at each function.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch

from ..core.tokenmap import TokenMap
from ..ops.tokens import Span

# Scripts written without spaces: each character counts as a word.
SOLID = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
# Letters, digits and the marks that combine with letters, which \w leaves out.
_LETTER = rf"(?:[^\W{SOLID}]|[\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0eff\u200c])"
NAME = rf"{_LETTER}+(?:(?:[-'’.:/@+&=%#~?\\]++|(?<=\d),(?=\d{{3}}(?!\d))){_LETTER}+)*"
_EMOJI = r"[\U0001f1e6-\U0001f1ff]{2}|[^\w\s](?:[\ufe0f\U0001f3fb-\U0001f3ff]|\u200d[^\w\s])+"
_WORD = re.compile(rf"\s*+(?:{NAME}|[{SOLID}]|{_EMOJI}|([^\w\s])\1*|\S|\Z)")

FENCE = re.compile(r"^[ \t]*(```|~~~).*?(?:^[ \t]*\1[^\n]*(?:\n\s*)?|\Z)", re.MULTILINE | re.DOTALL)
_STOP = re.compile(
    r"""(?P<mark>(?<![.!?…])[.!?…]++[)\]"'”’*_`]*+(?!\S)\s*)"""
    r"""|(?<![。！？])[。！？]++[」』”’）]*+\s*"""
    r"""|\n\s*"""
)
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|etc|cf|al|Figs?|Eqs?|Secs?|Nos?|Vol|pp?|approx|ca|Inc|Ltd|Co|Corp|Gen|Col"
    r"|Lt|Sgt|Rev|Hon|Mt|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)|\b(?:\w\.)+\w|\b[A-HJ-Z]|^[ \t]*\d+)\.\s*\Z",
    re.MULTILINE,
)

_FUNCTION_WORDS = """
about above across after against along although am among and are around as at be because been before behind being
below beneath beside between beyond both but by can cannot could did do does doing done down during either except
for from had has have having he her hers herself him himself how i if in into is it itself like may me might mine
must my myself near neither nor not of off on onto or our ours ourselves out over per shall she should since so than
that their theirs them themselves then there therefore they though through throughout thus till to toward towards
under until unless up upon us was we were what whatever when where whether which while who whom whose why will with
within without would yet you your yours yourself yourselves ain't aren't can't couldn't didn't doesn't don't hadn't
hasn't haven't isn't mustn't shouldn't wasn't weren't won't wouldn't it's i'm i've i'll he's she's they're we're
"""
_DETERMINERS = "a an the this that these those my your his her its our their some any each every no"
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
DETERMINERS = frozenset(_DETERMINERS.split())


def words(text: str) -> list[Span]:
    """Words, punctuation marks and symbols, each with the white space before it.

    A word is never cut at a character that joins: ``0.21``, ``don't``, ``a/b.py`` and ``https://x.org/?q=1`` are one
    word each. A Chinese or Japanese character is a word of its own, and so is an emoji with its modifiers.
    """
    return _without_blanks(text, [m.span() for m in _WORD.finditer(text) if m.group()])


def phrases(text: str, longest: int = 4) -> list[Span]:
    """Noun-phrase-like chunks: an optional determiner and up to ``longest`` content words, white space before included.

    Function words and punctuation are units of their own. This stands in for a parser's noun chunks: a verb that
    directly follows its noun joins its chunk, and in languages other than English only punctuation ends a chunk early.
    """
    units: list[Span] = []
    room = 0  # how many more content words the last unit takes
    for start, end in words(text):
        word = text[start:end].strip().lower()
        content = any(c.isalnum() for c in word) and (word not in FUNCTION_WORDS or word in DETERMINERS)
        if content and word not in DETERMINERS and room and "\n" not in text[start:end]:
            units[-1] = (units[-1][0], end)
            room -= 1
        else:
            units.append((start, end))
            room = 0 if not content else longest if word in DETERMINERS else longest - 1
    return units


def sentences(text: str) -> list[Span]:
    """Sentences, each with the white space after it. A fenced code block is one sentence.

    A sentence ends at ``.``, ``!``, ``?``, ``…`` (closing quotes and brackets included) before white space, at the
    Chinese and Japanese full stops, and at a line break. It goes on where the next letter is lower-case (unless a blank
    line makes a paragraph), and after a common English abbreviation, an initial or the number of a list item.
    """
    ends: list[int] = []
    for start, end, is_code in _blocks(text):
        ends += [] if is_code else _sentence_ends(text, start, end)
        ends.append(end)
    return _without_blanks(text, [(a, b) for a, b in pairwise([0, *ends]) if a < b])


def _blocks(text: str) -> Iterator[tuple[int, int, bool]]:
    """The text's fenced code blocks and what lies between them."""
    done = 0
    for fence in FENCE.finditer(text):
        yield done, fence.start(), False
        yield *fence.span(), True
        done = fence.end()
    yield done, len(text), False


def _sentence_ends(text: str, start: int, end: int) -> Iterator[int]:
    for found in _STOP.finditer(text, start, end):
        stop = found.end()
        goes_on = text[stop : stop + 1].islower()
        abbreviated = found["mark"] and _ABBREVIATION.search(text[max(start, found.start() - 20) : stop])
        if found.group().count("\n") > 1 or not (goes_on or abbreviated):
            yield stop


def _without_blanks(text: str, spans: list[Span]) -> list[Span]:
    """Join spans of nothing but white space to their neighbours."""
    out: list[Span] = []
    for start, end in spans:
        if out and (text[start:end].isspace() or join(text, out[-1:]).isspace()):
            out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
    return out


# ---- spans, text and maps -------------------------------------------------------------------------------------------


def join(text: str, spans: Iterable[Span]) -> str:
    """The text of the spans, nothing between them."""
    return "".join(text[start:end] for start, end in spans)


def disjoint(spans: Iterable[Span]) -> list[Span]:
    """Spans in order, those that overlap joined (the tokens of one emoji), empty ones left out."""
    out: list[Span] = []
    for start, end in spans:
        if out and start < out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        elif start < end:
            out.append((start, end))
    return out


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same characters in as few spans as possible; the order stays."""
    out: list[Span] = []
    for start, end in spans:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], end)
        elif start < end:
            out.append((start, end))
    return out


_IN_WORD = re.compile(_LETTER)


_OPENS = frozenset("([{«“‘「『（")
_CLOSES = frozenset(",.;:!?…)]}»”’'\"%。，、；：！？」』）】》")
_SOLID = re.compile(f"[{SOLID}]")
_MARKS = re.compile(r"[^\w\s]++\s*+|\s++")


def bridges(text: str, spans: Iterable[Span]) -> list[Span]:
    """The spans, in order, with what keeps them apart where something was left out between them.

    The white space before a span stays unless white space comes before it anyway. Where two spans would still touch, so
    do the marks and the white space behind the earlier one. Each is a span of the text. Brackets and punctuation may
    touch the words that they would belong to, characters of scripts without spaces their neighbours, and parts of one
    word each other.
    """
    out: list[Span] = []
    for start, end in spans:
        left = out[-1][1] if out else start
        if left < start and not text[left - 1].isspace():
            if text[start - 1].isspace():
                blank = start - 1
                while blank > left and text[blank - 1].isspace():
                    blank -= 1
                out.append((blank, start))
            elif _should_not_touch(text, left, start) and (marks := _MARKS.match(text, left, start)):
                out.append(marks.span())
        out.append((start, end))
    return out


def _should_not_touch(text: str, left: int, start: int) -> bool:
    """Whether what ends at ``left`` and what begins at ``start`` would read as one."""
    last, first = text[left - 1], text[start]
    if first.isspace() or last in _OPENS or first in _CLOSES or _SOLID.match(last) or _SOLID.match(first):
        return False
    torn = _IN_WORD.match(first) and _IN_WORD.match(text[start - 1])  # part of a word, as tokens are
    return not torn and not _IN_WORD.match(text[left])


def spans_to_map(spans: Iterable[Span], n_chars: int) -> TokenMap:
    """The selection that keeps these characters, in this order: ``n_chars`` characters to those of the spans."""
    edges = torch.tensor(merged(spans), dtype=torch.int64).reshape(-1, 2)
    lengths = edges[:, 1] - edges[:, 0]
    first = lengths.cumsum(0) - lengths  # where each span begins in the result
    index = torch.arange(int(lengths.sum())) + (edges[:, 0] - first).repeat_interleave(lengths)
    return TokenMap.select(index.unsqueeze(0), n_chars)


def map_to_spans(map: TokenMap) -> list[Span]:
    """The longest runs of consecutive characters that a selection keeps, in its order. Inverts :func:`spans_to_map`."""
    index = map.source[0][map.target[0] >= 0]
    if not len(index):
        return []
    breaks = (index.diff() != 1).nonzero().flatten() + 1
    edges = [0, *breaks.tolist(), len(index)]
    return [(int(index[a]), int(index[b - 1]) + 1) for a, b in pairwise(edges)]
