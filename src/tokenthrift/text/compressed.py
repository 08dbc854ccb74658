"""The result of compressing a text, with all that is needed to see and to check what was dropped."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from html import escape
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..core.tokenmap import TokenMap
    from ..ops.tokens import Span
    from .protect import Protected


@dataclass(frozen=True)
class CompressedText:
    """A shorter text, made of nothing but spans of the original; ``str()`` is the text.

    Attributes:
        text: the compressed text.
        original: the text before.
        kept: spans of the original, in characters, that make up the text, in its order.
        tokens_before, tokens_after: counts by the tokenizer that was given, special tokens left out.
        map: the same as ``kept``, as a map from the original's characters to the text's.
        seconds: time taken, loading of models left out.
        method: the steps as a plan, e.g. ``text=truncate(rate=0.4)``.
        notes: what did not go as asked, and why: sentences for the user.
        predicted_loss: share of the score mass that was dropped, in [0, 1]: of every unit its tokens times its score,
            scores shifted to be at least 0 (random scores lose ``1 - rate``). In a sequence of methods what is left is
            multiplied. None where a method did not choose by scores. It is not calibrated on any task.
        protected: what the policy protects in the original, with its kind.
    """

    text: str
    original: str = field(repr=False)
    kept: list[Span]
    tokens_before: int
    tokens_after: int
    map: TokenMap = field(repr=False)
    seconds: float
    method: str
    notes: tuple[str, ...] = ()
    predicted_loss: float | None = None
    protected: list[Protected] = field(default_factory=list, repr=False)

    @property
    def rate(self) -> float:
        """Share of the tokens kept: what was achieved, not what was asked for."""
        return self.tokens_after / self.tokens_before if self.tokens_before else 1.0

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the original and the map are left out, as ``kept`` has them."""
        names = ("text", "kept", "tokens_before", "tokens_after", "rate", "seconds", "method", "predicted_loss")
        return {**{name: getattr(self, name) for name in names}, "notes": list(self.notes)}

    def html(self, page: bool = False) -> str:
        """The original with what was dropped struck through and what is protected coloured by its kind.

        A ``<div>`` with classes alone, or with ``page`` a document of its own, with colours and a legend.
        """
        parts, done = [], 0
        for start, end in [*sorted(self.kept), (len(self.original),) * 2]:
            if done < start:
                parts.append(f"<del>{self._marked(done, start)}</del>")
            parts.append(self._marked(start, end))
            done = end
        shown = f'<div class="compressed-text" style="white-space: pre-wrap">{"".join(parts)}</div>'
        if not page:
            return shown
        kinds = dict.fromkeys(p.kind for p in self.protected)
        legend = " ".join(f'<mark class="{kind}">{kind}</mark>' for kind in kinds)
        lines = "<br>".join(map(escape, (self.summary, *self.notes)))
        colours = "\n".join(
            f".{kind} {{ background: hsl({37 * i % 360} 70% 50% / .3); }}" for i, kind in enumerate(kinds)
        )
        return _PAGE.format(summary=lines, legend=legend, shown=shown, colours=colours)

    explain = html

    def _marked(self, start: int, end: int) -> str:
        """A part of the original, escaped, with ``<mark>`` around what is protected in it."""
        parts = []
        first = bisect_right(self.protected, start, key=lambda p: p.end)
        for span in islice(self.protected, first, None):
            if span.start >= end:
                break
            a, b = max(span.start, start), min(span.end, end)
            parts.append(escape(self.original[start:a]))
            parts.append(f'<mark class="{span.kind}" title="{span.kind}">{escape(self.original[a:b])}</mark>')
            start = b
        return "".join([*parts, escape(self.original[start:end])])

    @property
    def summary(self) -> str:
        """One line: how many tokens of how many, in what time, by which method."""
        return (
            f"{self.tokens_before:,} -> {self.tokens_after:,} tokens ({self.rate:.1%} kept) "
            f"in {self.seconds:.2f} s by {self.method or 'no method'}"
        )


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>Compressed text</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em; }}
del {{ color: #b33; opacity: .55; }}
mark {{ color: inherit; background: none; border-radius: .2em; }}
{colours}
</style>
<p>{summary}</p>
<p>{legend}</p>
{shown}
</html>
"""
