"""LLMLingua-2: an encoder that was taught by a large language model which words to keep."""

from __future__ import annotations

import os
from bisect import bisect_right
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.budget import Budget
from ..core.errors import ThriftError, check_choice
from ..core.method import method
from ..core.view import View
from ..models.token_classifier import TokenClassifier, as_classifier, load_token_classifier
from ..ops.tokens import Span, count_tokens, encode
from .documents import split_documents
from .llmlingua2_words import authors_chunks, authors_keep, authors_words
from .selection import best_within
from .spans import spans_to_map, words

if TYPE_CHECKING:
    from ..core.tokenmap import TokenMap


@method(
    "llmlingua2",
    stage="text",
    paper="LLMLingua-2: Data Distillation for Efficient and Faithful Task-Agnostic Prompt Compression",
    arxiv="2403.12968",
    needs=("text", "tokenizer"),
)
class LLMLingua2:
    """Keeps the words that a token classifier would keep with the highest probability.

    A word's probability is the mean over its tokens, whatever the encoder's tokenizer: their places in the text decide
    to which word they belong. Words are chosen from the whole text together, exactly as many as the rate allows.
    ``compat="llmlingua"`` makes the decisions of the authors' code on pieces of XLM-R and mBERT tokenizers, golden
    cases equal: a percentile per chunk, so that unimportant chunks keep as large a share as others. Different even
    there: the encoder sees its own special tokens, and ``force_tokens`` of several pieces are refused, for which the
    authors' code adds untrained tokens to the encoder.

    Attributes:
        rate: share of the tokens to keep, in (0, 1]; an int is a number of tokens.
        model: the token classifier: a folder, a hub id, or (model, tokenizer); it is not among the packs.
        by: a word's probability is the ``mean`` of its tokens' or that of the ``first``.
        force_tokens: words that always stay, such as ``("?", "not")``; ``"\\n"`` keeps the words at line starts.
        force_digits: words with digits always stay.
        drop_consecutive: of equal forced words with nothing kept between them, one is enough.
        document_rate: share of the documents that stay, the others go whole: those whose words' mean probability is
            lowest.
        separator: what stands between documents.
        compat: ``budget``, or ``llmlingua`` for the authors' choice of words.
    """

    rate: float = 0.5
    model: Any = "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank"
    by: str = "mean"
    force_tokens: Any = ()
    force_digits: bool = False
    drop_consecutive: bool = False
    document_rate: float = 1.0
    separator: str = "\n\n"
    compat: str = "budget"

    def __post_init__(self) -> None:
        Budget.of(self.rate)
        object.__setattr__(self, "model", as_classifier("llmlingua2", self.model))
        for key, known in (("by", ("mean", "first")), ("compat", ("budget", "llmlingua"))):
            check_choice("llmlingua2", key, getattr(self, key), known)
        if isinstance(self.force_tokens, str) or not all(isinstance(t, str) and t for t in self.force_tokens):
            raise ThriftError("llmlingua2 takes force_tokens as a list of words: write force_tokens=['?', 'not']")
        if not 0 < self.document_rate <= 1:
            raise ThriftError(f"llmlingua2 document_rate {self.document_rate} is outside (0, 1]; 1.0 keeps them all")

    def prepare(self, view: View) -> None:
        self.load()

    def load(self) -> TokenClassifier:
        """The classifier; one that was named is loaded on first use."""
        if isinstance(self.model, TokenClassifier):
            return self.model
        return load_token_classifier(os.fspath(self.model))

    def reduce(self, view: View) -> TokenMap:
        text = view.text
        if not text.strip() or Budget.of(self.rate).tokens(total := count_tokens(view.tokenizer, text)) >= total:
            return spans_to_map([(0, len(text))], len(text))
        if self.compat == "llmlingua":
            return spans_to_map(_as_the_authors(self, view), len(text))

        units = words(text)
        plain = _of_units(units, self.load().probabilities(text), self.by)
        forced = [self._is_forced(text[start:end]) for start, end in units]
        scores = [float("inf") if force else p for p, force in zip(plain, forced, strict=True)]
        if self.drop_consecutive:
            _demote_repeated(text, units, scores, plain, forced, Budget.of(self.rate).tokens(total) / total)
        if self.document_rate < 1:
            _demote_documents(split_documents(text, self.separator), units, scores, plain, self.document_rate)
        kept = best_within(text, units, scores, self.rate, view.tokenizer)
        if self.drop_consecutive:
            inside = {unit for unit, force in zip(units, forced, strict=True) if force}
            kept = kept[:1] + [b for a, b in pairwise(kept) if not (a in inside and _same(text, a, b))]
        return spans_to_map(kept, len(text))

    def _is_forced(self, unit: str) -> bool:
        word = unit.strip()
        blank = unit[: len(unit) - len(unit.lstrip())]
        return any(t == word or (t.isspace() and t in blank) for t in self.force_tokens) or (
            self.force_digits and any(c.isdigit() for c in word)
        )


def _of_units(units: list[Span], tokens: list[tuple[int, int, float]], by: str) -> list[float]:
    """The probability of each unit; one in which no token ends is infinitely likely, as it costs next to nothing."""
    found: list[list[float]] = [[] for _ in units]
    ends = [end for _, end in units]
    for _, end, p in tokens:
        found[min(bisect_right(ends, end - 1), len(ends) - 1)].append(p)
    return [float("inf") if not p else p[0] if by == "first" else sum(p) / len(p) for p in found]


def _same(text: str, a: Span, b: Span) -> bool:
    return text[slice(*a)].strip() == text[slice(*b)].strip()


def _demote_repeated(
    text: str, units: list[Span], scores: list[float], plain: list[float], forced: list[bool], rate: float
) -> None:
    """Forced words that say again what the last one said, with nothing between that is likely to stay, go first."""
    likely = float(np.percentile([p for p in plain if np.isfinite(p)] or [0.0], 100 * (1 - rate)))
    last: Span | None = None
    for i, unit in enumerate(units):
        if forced[i]:
            if last is not None and _same(text, last, unit):
                scores[i] = -1.0
            last = unit
        elif plain[i] > likely:
            last = None


def _demote_documents(
    documents: list[Span], units: list[Span], scores: list[float], plain: list[float], rate: float
) -> None:
    """The words of the documents below the percentile go before all others."""
    starts = [start for start, _ in documents]
    of = [max(bisect_right(starts, end - 1) - 1, 0) for _, end in units]
    found: list[list[float]] = [[] for _ in documents]
    for p, document in zip(plain, of, strict=True):
        if np.isfinite(p):
            found[document].append(p)
    means = [float(np.mean(p)) if p else 0.0 for p in found]
    threshold = np.percentile(means, int(100 * (1 - rate)))
    for unit, document in enumerate(of):
        if means[document] < threshold:
            scores[unit] = -2.0 + means[document]


def _as_the_authors(method: LLMLingua2, view: View) -> list[Span]:
    """What the authors' code keeps of the documents, with the gaps before all but the first of them."""
    text, classifier = view.text, method.load()
    tokenizer = classifier.tokenizer
    long = [t for t in method.force_tokens if len(encode(tokenizer, [t])[0][0]) != 1]
    if long:
        raise ThriftError(f"compat='llmlingua' keeps words of one piece, not {long[0]!r}: leave it or compat out")
    wordpiece = any(piece.startswith("##") for piece in tokenizer.get_vocab())
    documents = split_documents(text, method.separator)
    chunks: list[tuple[int, list[int], list[str], list[Span]]] = []
    for number, (start, end) in enumerate(documents):
        ids, spans = encode(tokenizer, [text[start:end]])[0]
        pieces = tokenizer.convert_ids_to_tokens(ids)
        for a, b in authors_chunks(pieces, classifier.room, {".", "\n"}):
            chunks.append((number, ids[a:b], pieces[a:b], [(start + x, start + y) for x, y in spans[a:b]]))
    force = set(method.force_tokens)
    found = [
        authors_words(pieces, p.tolist(), force=force, digits=method.force_digits, wordpiece=wordpiece)
        for (_, _, pieces, _), p in zip(chunks, classifier.of_pieces([c[1] for c in chunks]), strict=True)
    ]
    plain: list[list[float]] = [[] for _ in documents]
    for (number, *_), made in zip(chunks, found, strict=True):
        plain[number] += [word.plain[0] if method.by == "first" else float(np.mean(word.plain)) for word in made]
    means = [float(np.mean(p)) if p else 0.0 for p in plain]
    threshold = np.percentile(means, int(100 * (1 - method.document_rate)))

    used = [number for number, mean in enumerate(means) if mean >= threshold]
    total = sum(count_tokens(view.tokenizer, text[slice(*documents[number])]) for number in used)
    budget = Budget.of(method.rate)
    rate = budget.ratio if budget.ratio is not None else min((budget.count or 1) / total, 1.0)
    kept = [(documents[number - 1][1], documents[number][0]) for number in used if number > used[0]]
    for (number, _, _, spans), made in zip(chunks, found, strict=True):
        if number not in used:
            continue
        counts = [max(count_tokens(view.tokenizer, word.text), 1) for word in made]
        probabilities = [word.probability(method.by) for word in made]
        keep = authors_keep(
            [word.text for word in made],
            probabilities,
            rate,
            counts,
            force=force,
            drop_consecutive=method.drop_consecutive,
        )
        kept += [(spans[w.first][0], spans[w.last][1]) for w, k in zip(made, keep, strict=True) if k]
    return sorted(span for span in kept if span[0] < span[1])
