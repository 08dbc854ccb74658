"""LLMLingua: documents by perplexity, then tokens by surprise, segment by segment."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.budget import Budget
from ..core.errors import ThriftError, check_choice
from ..core.method import method
from ..core.view import View
from ..ops.tokens import Span, count_tokens, encode
from .documents import ORDERS, Units, arranged, gaps_between, rate_changes, reordered, split_documents, within_budget
from .iterative import Surprise, authors_kept, authors_schedule, margins
from .selection import best_within
from .spans import disjoint, join, spans_to_map

if TYPE_CHECKING:
    from ..core.tokenmap import TokenMap


@method(
    "llmlingua",
    stage="text",
    paper="LLMLingua: Compressing Prompts for Accelerated Inference of Large Language Models",
    arxiv="2310.05736",
    needs=("text", "tokenizer", "scorer"),
)
class LLMLingua:
    """Keeps the tokens that a small causal LM finds surprising, given what was kept before them.

    Whole documents first: those of high perplexity until the budget and ``spare`` tokens are filled. Then tokens, in
    segments: each is read behind the compressed text so far, and its own threshold decides what later segments are
    read behind. The result takes the words that are furthest above their thresholds, exactly as many as the rate of
    the user's tokens allows. ``compat="llmlingua"`` makes the decisions of the authors' code, golden cases equal:
    there the token before an unsurprising one is dropped, a text shorter than a segment is not compressed, and the rate
    is met roughly. The optional sentence filter of the authors' code is left out.

    Attributes:
        rate: share of the tokens to keep, in (0, 1]; an int is a number of tokens.
        level: what is dropped as a whole: ``word``, or ``token`` as in the paper, which may be a part of a word.
        size: tokens of a segment, counted by the scorer's tokenizer.
        separator: what stands between documents, such as an empty line; empty: the text is one document.
        spare: how many tokens more than the budget the chosen documents have, for the tokens to be chosen from.
        compat: ``budget``, or ``llmlingua`` for the authors' choice of tokens.
    """

    rate: float = 0.5
    level: str = "word"
    size: int = 200
    separator: str = ""
    spare: int = 100
    compat: str = "budget"
    order: ClassVar[str] = "original"
    spread: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        check(self, "llmlingua")

    def reduce(self, view: View) -> TokenMap:
        documents = split_documents(view.text, self.separator)
        exact = self.compat == "llmlingua"
        ranking, scored = by_perplexity(view, documents, exact)
        if exact:
            surprise = view.scorer.reading(start=False).surprise
            return as_the_authors(view, self, documents, ranking, surprise)
        return coarse_to_fine(view, self, documents, ranking, scored)


def check(method: Any, name: str) -> None:
    """Refuse parameters that mean nothing, when the plan is read."""
    Budget.of(method.rate)
    for key, known in (("level", ("word", "token")), ("compat", ("budget", "llmlingua")), ("order", ORDERS)):
        check_choice(name, key, getattr(method, key, known[0]), known)
    if method.size < 2 or method.spare < 0:
        raise ThriftError(f"{name} needs size of at least 2 and spare of at least 0")


def by_perplexity(
    view: View, documents: Sequence[Span], exact: bool = False
) -> tuple[list[int], Callable[[int], Surprise]]:
    """The documents, the one first that the scorer finds hardest to guess, and what scores a text that begins with one.

    Args:
        exact: as in the authors' code, nothing stands before a document, and its first token is not counted.
    """
    scorer = view.scorer
    if len(documents) < 2:
        return [0], lambda _: scorer.reading(start=not exact).surprise
    encoded = encode(scorer.tokenizer, [view.text[start:end] for start, end in documents])
    nats = [scorer.reading(start=not exact).surprise(ids, len(ids) - exact) for ids, _ in encoded]

    def scored(first: int) -> Surprise:
        known = (encoded[first][0], nats[first])
        return scorer.reading(known=known if len(known[0]) == len(known[1]) else None).surprise

    return sorted(range(len(documents)), key=lambda i: -float(nats[i].mean())), scored


def coarse_to_fine(
    view: View, method: Any, documents: list[Span], ranking: list[int], surprise: Callable[[int], Surprise]
) -> TokenMap:
    """Documents from the ranking, then units of them within the budget.

    Args:
        method: its ``rate``, ``level``, ``size`` and ``spare`` are used; its ``order`` of the documents in the result,
            see :func:`~tokenthrift.text.documents.arranged`; and its ``spread``, how much more than average the best
            document keeps, and the worst less.
        ranking: the documents, best first.
        surprise: given the document that is read first, what makes a token worth keeping.
    """
    text, tokenizer, scorer = view.text, view.tokenizer, view.scorer
    total = count_tokens(tokenizer, text)
    target = Budget.of(method.rate).tokens(total)
    if target >= total:
        return spans_to_map([(0, len(text))], len(text))

    ids, spans = encode(scorer.tokenizer, [text])[0]
    units = Units.of(text, documents) if method.level == "word" else Units.tokens(disjoint(spans), documents)
    unit_of = units.of_tokens(spans)
    inside: list[list[int]] = [[] for _ in documents]
    for token, unit in enumerate(unit_of):
        inside[units.document[unit]].append(token)

    wanted = target / total * len(ids)
    used = within_budget([len(tokens) for tokens in inside], ranking, wanted, method.spare)
    changes = rate_changes(used, method.spread)
    base = wanted / max(sum(len(inside[i]) for i in used), 1)
    share = {i: max(0.0, min(1.0, base + changes[i])) for i in used}
    chosen = arranged(used, method.order)
    read = [token for i in chosen for token in inside[i]]
    while len(read) > 1 and units.gap[unit_of[read[0]]]:
        read = read[1:]  # what separates the first document from those left out
    rates = [1.0 if units.gap[unit_of[t]] else share[units.document[unit_of[t]]] for t in read]

    limit = scorer.reading().limit
    size = method.size if limit is None else max(2, min(method.size, limit // 4))
    told = _telling(surprise(chosen[0]), scorer.progress, len(read))
    margin = margins([ids[t] for t in read], rates, [unit_of[t] for t in read], size, told)

    place = {document: rank for rank, document in enumerate(ranking)}
    lowest = min([value for value in margin.tolist() if math.isfinite(value)], default=0.0)
    scores = [lowest - 1 - place[document] for document in units.document]
    for token, value in zip(read, margin.tolist(), strict=True):
        scores[unit_of[token]] = value
    ends_here = set(unit_of)
    for unit in reversed(range(len(scores) - 1)):
        if unit not in ends_here and not units.gap[unit + 1]:
            scores[unit] = scores[unit + 1]  # no token ends in it: a token of the next unit begins here
    _score_gaps(units, scores)
    return _selected(view, method, units, scores, documents, chosen if method.order != "original" else None)


def _telling(surprise: Surprise, progress: Any, total: int) -> Surprise:
    done = 0

    def told(ids: list[int], last: int) -> Any:
        nonlocal done
        done += last
        if progress is not None:
            progress(done, total)
        return surprise(ids, last)

    return told


def _score_gaps(units: Units, scores: list[float]) -> None:
    """A gap stays as long as anything of the document behind it: its score is next to the best one there."""
    best: dict[int, float] = {}
    for score, document, gap in zip(scores, units.document, units.gap, strict=True):
        if not gap:
            best[document] = max(score, best.get(document, -math.inf))
    for unit, (document, gap) in enumerate(zip(units.document, units.gap, strict=True)):
        if gap:
            most = best.get(document, scores[unit])
            scores[unit] = math.nextafter(most, -math.inf) if math.isfinite(most) else most


def _selected(
    view: View, method: Any, units: Units, scores: list[float], documents: list[Span], order: list[int] | None
) -> TokenMap:
    text, tokenizer = view.text, view.tokenizer
    target = Budget.of(method.rate).tokens(count_tokens(tokenizer, text))
    gaps = set(gaps_between(documents))
    asked: Any = method.rate
    while True:
        kept = best_within(text, units.spans, scores, asked, tokenizer)
        if order is None:
            while len(kept) > 1 and kept[0] in gaps:
                kept = kept[1:]  # a gap with nothing before it
            return spans_to_map(kept, len(text))
        unused = [i for i in range(len(documents)) if i not in order]
        moved = reordered(kept, documents, [*order, *unused])
        # Where other words meet, the tokenizer may need a token more than before.
        over = count_tokens(tokenizer, join(text, moved)) - target
        lower = (asked if isinstance(asked, int) else target) - over
        if over <= 0 or lower < 1:
            return spans_to_map(moved, len(text))
        asked = lower


def as_the_authors(
    view: View,
    method: Any,
    documents: list[Span],
    ranking: list[int],
    surprise: Surprise,
    question: str = "",
    alone: Surprise | None = None,
) -> TokenMap:
    """Documents and tokens as the authors' code chooses them, read behind a question where there is one."""
    text, tokenizer = view.text, view.scorer.tokenizer
    lengths = [len(ids) for ids, _ in encode(tokenizer, [text[a:b] for a, b in documents])]
    budget = Budget.of(method.rate)
    target = budget.count if budget.count is not None else sum(lengths) * (budget.ratio or 1.0)
    used = within_budget(lengths, ranking, target, method.spare) if len(documents) > 1 else ranking
    changes = rate_changes(used, method.spread) if len(documents) > 1 else {0: 0.0}
    chosen = arranged(used, method.order)
    everything = sorted([*documents, *gaps_between(documents)])
    pieces = reordered(everything, documents, chosen)

    # The question is tokenised together with what follows it: white space between them may change its tokens.
    ids, spans = encode(tokenizer, [question + join(text, pieces)])[0]
    start = sum(end <= len(question) for _, end in spans)
    longest = view.scorer.reading().limit
    if longest is not None and len(ids) > longest:
        raise ThriftError(f"compat='llmlingua' reads {longest} tokens at once, here are {len(ids)}: leave compat out")
    schedule = authors_schedule([lengths[i] + 2 for i in chosen], target, method.size, [changes[i] for i in chosen])
    left = authors_kept(ids, schedule, method.size, surprise, start=start, alone=alone)
    kept = disjoint((max(a - len(question), 0), b - len(question)) for a, b in (spans[start + i] for i in left))
    return spans_to_map(pieces, len(text)).then(spans_to_map(kept, len(join(text, pieces))))
