"""Cases: prompts with held-back continuations, and questions whose answers are in the prompt, built into real text."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

from ..core.errors import ThriftError
from .data import Data, Document

Ends = Callable[[str], list[int]]


@dataclass(frozen=True)
class Suite:
    """How much to measure. Lengths are in tokens; ``scenes`` are images, with up to seven questions each."""

    name: str
    documents: int
    document_tokens: int
    continuation: int
    quotes: int
    lookups: int
    lookup_tokens: int
    generations: int
    generation_tokens: int
    new_tokens: int
    repeats: int
    scenes: int = 0

    note: ClassVar[str] = ""

    def cases(self, data: Data, tokenizer: Any, seed: int, limit: int | None) -> list[Case]:
        """See :func:`build_cases`."""
        return build_cases(data, tokenizer, self, seed, limit)

    def usable(self, data: Data) -> Data:
        """The part of the data that the suite can measure on."""
        return data

    def flags(self) -> list[str]:
        """Words of a command line that make this suite out of the one with its name."""
        return []


SUITES = {
    "quick": Suite("quick", 5, 768, 48, 4, 8, 576, 2, 512, 24, 3, 16),
    "full": Suite("full", 24, 1536, 64, 6, 32, 1024, 6, 1024, 64, 5, 150),
}


@dataclass(frozen=True)
class Probe:
    """A piece of text to follow the prompt, of which the model should find the last part, ``answer``.

    The score is the share of the answer's tokens that are the most likely ones, by teacher forcing; 1.0 means that
    greedy decoding would have written it. This works for small base models too, which follow no instructions.
    """

    task: str
    lead: str
    answer: str


@dataclass(frozen=True)
class Case:
    """One prompt: ``context`` (what a text stage may shorten) then ``question``; then what is asked of the model.

    ``kind`` is ``document``, ``lookup``, ``prompt`` (the user's own) or ``generation`` (timed, with ``new_tokens``); a
    ``prompt`` without continuation is compared on what the unmodified model itself says next. Else it is the task of a
    suite of questions: there is one probe, strings are ``expected`` in what the model writes, ``score`` (``recall`` or
    ``probability``) ranks the plans, and ``cell`` is the row and column in a table of scores.
    """

    id: str
    kind: str
    context: str
    question: str = ""
    continuation: str = ""
    probes: tuple[Probe, ...] = ()
    new_tokens: int = 0
    chat: bool = False
    # Not in the text by which a run knows its cases again: all of it follows from the above, for older runs too.
    expected: tuple[str, ...] = field(default=(), repr=False)
    score: str = field(default="", repr=False)
    cell: tuple[str, str] = field(default=("", ""), repr=False)


TASKS = {
    "continuation": "the next token of the document's held-back continuation is the most likely one",
    "quote": "a sentence of the document is begun again after the prompt: share of its next tokens found",
    "lookup": "one of four codes hidden in the document is asked for: share of its tokens found",
    "answer": "share of the tokens of the user's own answers found",
}
"""What the scores mean; all lie between 0 and 1."""

PLACES = (
    "Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Cairo", "Lima", "Dublin", "Kyoto", "Geneva", "Havana", "Tunis",
    "Riga", "Perth", "Accra", "Manila", "Sofia", "Dakar", "Austin", "Bergen",
)  # fmt: skip


def build_cases(data: Data, tokenizer: Any, suite: Suite, seed: int = 0, limit: int | None = None) -> list[Case]:
    """The cases of a suite, the same for the same data, tokenizer and seed.

    Args:
        limit: the longest sequence that the model takes. Prompts cut from documents are made to fit; a user's own
            prompt that does not fit raises ThriftError.
    """
    rng = random.Random(seed)
    room = limit or 10**9
    ends = token_ends(tokenizer)
    chat = bool(getattr(tokenizer, "chat_template", None))
    cases: list[Case] = []
    if data.documents:
        cases += _documents(data, ends, suite, rng, room)
        cases += _lookups(data, ends, suite, rng, room)
    cases += _own_prompts(data, ends, suite, room, chat)
    cases += _generations(data, ends, suite, rng, room, chat)
    return cases


def token_ends(tokenizer: Any) -> Ends:
    """Where in a text each of its tokens ends; a text is tokenised once."""

    @cache
    def ends(text: str) -> list[int]:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [end for _, end in encoded["offset_mapping"]]

    return ends


# ---- documents: continuation and quotes -----------------------------------------------------------------------------


def _documents(data: Data, ends: Ends, suite: Suite, rng: random.Random, room: int) -> list[Case]:
    length = min(suite.document_tokens, room - 2 * suite.continuation)
    pieces = pick(data.documents, ends, suite.documents, length, suite.continuation, rng)
    if not pieces:
        raise ThriftError(f"{data.documents[0].name} is too short to measure on: give at least some 50 words of text")
    return [
        Case(f"document/{name}", "document", head, "", tail, tuple(quotes(head, suite.quotes, rng)))
        for name, head, tail in pieces
    ]


def pick(
    documents: Sequence[Document], ends: Ends, count: int, length: int, tail: int, rng: random.Random
) -> list[tuple[str, str, str]]:
    """Up to ``count`` pieces ``(name, head, tail)`` that do not overlap, drawn from as many documents as possible."""
    per_document = [windows(d, ends, length, tail) for d in documents]
    for pieces in per_document:
        rng.shuffle(pieces)
    rng.shuffle(per_document)
    rounds = [p for i in range(count) for pieces in per_document for p in pieces[i : i + 1]]
    return rounds[:count]


def windows(document: Document, ends_of: Ends, length: int, tail: int) -> list[tuple[str, str, str]]:
    """Consecutive pieces of ``length`` tokens and the ``tail`` tokens that follow; a short text is one piece."""
    text = document.text
    ends = ends_of(text)
    if len(ends) < length + tail:
        tail = min(tail, len(ends) // 4)
        length = len(ends) - tail
        if tail < 4:
            return []
    pieces = []
    for i, start in enumerate(range(0, len(ends) - length - tail + 1, length + tail)):
        a = ends[start - 1] if start else 0
        b, c = ends[start + length - 1], ends[start + length + tail - 1]
        pieces.append((f"{document.name}#{i}", text[a:b], text[b:c]))
    return pieces


def quotes(text: str, count: int, rng: random.Random) -> Iterator[Probe]:
    """Sentences of the text, begun again: the first six words are given, the next eight are to be found."""
    found = []
    for match in re.finditer(r"(?:^|[.!?:]\s+|\n\s*\n[ *]*)([A-Z][^.!?]{60,400})(?=[.!?])", text):
        sentence = match.group(1)
        words = list(re.finditer(r"\S+", sentence))
        plain = sum(c.isalnum() or c.isspace() or c in ",'-\"*_()" for c in sentence) / len(sentence)
        if len(words) < 14 or plain < 0.95:
            continue
        lead, answer = sentence[: words[5].end()], sentence[words[5].end() : words[13].end()]
        if text.count(lead) == 1:
            found.append(Probe("quote", f'\n\nThe text above says: "{lead}', answer))
    yield from rng.sample(found, min(count, len(found)))


# ---- lookups --------------------------------------------------------------------------------------------------------


def _lookups(data: Data, ends: Ends, suite: Suite, rng: random.Random, room: int) -> list[Case]:
    length = min(suite.lookup_tokens, room - 200)
    if length < 100:
        return []
    pieces = pick(data.documents, ends, suite.lookups, length, 4, rng)
    return [lookup(name, head, rng) for name, head, _ in pieces]


def lookup(name: str, text: str, rng: random.Random, records: int = 4) -> Case:
    """Hide ``records`` codes between the lines of a text and ask for one of them."""
    lines = text.split("\n")
    places = rng.sample(PLACES, records)
    codes = [str(n) for n in rng.sample(range(10000, 100000), records)]
    spots = sorted((rng.randrange(1, max(len(lines), 2)) for _ in range(records)), reverse=True)
    for spot, place, code in zip(spots, places, codes, strict=True):
        lines.insert(spot, f"\nThe access code of the {place} office is {code}.\n")
    asked = rng.randrange(records)
    place, code = places[asked], codes[asked]
    return Case(
        f"lookup/{name}",
        "lookup",
        "\n".join(lines),
        # As in RULER, the prompt ends with the beginning of the answer, so that methods that look at the last queries
        # see what is wanted, and a base model knows what to write.
        f"\n\nQuestion: What is the access code of the {place} office?\n"
        f"Answer: The access code of the {place} office is",
        probes=(Probe("lookup", "", f" {code}"),),
    )


# ---- the user's prompts ---------------------------------------------------------------------------------------------


def _own_prompts(data: Data, ends: Ends, suite: Suite, room: int, chat: bool) -> list[Case]:
    cases = []
    for prompt in data.prompts:
        used = len(ends(prompt.text))
        if used + suite.new_tokens > room:
            raise ThriftError(
                f"{prompt.name}: the prompt has {used:,} tokens, the model takes {room:,} "
                f"(with {suite.new_tokens} more to generate): shorten it or use a model with a longer context"
            )
        lead = "" if chat or prompt.text[-1].isspace() else " "
        probes = (Probe("answer", "", lead + prompt.answer.strip()),) if prompt.answer else ()
        cases.append(
            Case(f"prompt/{prompt.name}", "prompt", prompt.text, probes=probes, new_tokens=suite.new_tokens, chat=chat)
        )
    return cases


# ---- timed generation -----------------------------------------------------------------------------------------------


def _generations(data: Data, ends: Ends, suite: Suite, rng: random.Random, room: int, chat: bool) -> list[Case]:
    """Half of them edit code (the output repeats the input), half continue a document; or the user's first prompts."""
    if data.prompts:
        return [
            Case(f"generation/{p.name}", "generation", p.text, new_tokens=suite.new_tokens, chat=chat)
            for p in data.prompts[: suite.generations]
        ]
    length = min(suite.generation_tokens, room - suite.new_tokens - 40)
    half = suite.generations // 2 if data.code else 0
    edits = pick(data.code, ends, half, length, 4, rng)
    texts = pick(data.documents, ends, suite.generations - len(edits), length, 4, rng)
    ask = "\n\n# The same code again, with small corrections:\n"
    return [
        *(
            Case(f"generation/{n}", "generation", code, ask + opening(code), new_tokens=suite.new_tokens)
            for n, head, _ in edits
            if (code := head[head.find("\n") + 1 :])  # from its first whole line
        ),
        *(Case(f"generation/{n}", "generation", head, new_tokens=suite.new_tokens) for n, head, _ in texts),
    ]


def opening(code: str, lines: int = 8) -> str:
    """The first whole lines of a piece of code, with which its repetition begins."""
    return "\n".join(code.split("\n")[:lines]) + "\n"
