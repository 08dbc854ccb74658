"""The result of compressing a text, with all that is needed to see and to check what was dropped."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..core.tokenmap import TokenMap
    from ..ops.tokens import Span


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
    """

    text: str
    original: str = field(repr=False)
    kept: list[Span]
    tokens_before: int
    tokens_after: int
    map: TokenMap = field(repr=False)
    seconds: float
    method: str

    @property
    def rate(self) -> float:
        """Share of the tokens kept: what was achieved, not what was asked for."""
        return self.tokens_after / self.tokens_before if self.tokens_before else 1.0

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the original and the map are left out, as ``kept`` has them."""
        names = ("text", "kept", "tokens_before", "tokens_after", "rate", "seconds", "method")
        return {name: getattr(self, name) for name in names}

    def html(self, page: bool = False) -> str:
        """The original with what was dropped struck through: a ``<div>``, or with ``page`` a document of its own."""
        parts, done = [], 0
        for start, end in [*sorted(self.kept), (len(self.original),) * 2]:
            if done < start:
                parts.append(f"<del>{escape(self.original[done:start])}</del>")
            parts.append(escape(self.original[start:end]))
            done = end
        shown = f'<div class="compressed-text" style="white-space: pre-wrap">{"".join(parts)}</div>'
        return _PAGE.format(summary=escape(self.summary), shown=shown) if page else shown

    @property
    def summary(self) -> str:
        """One line: how many tokens of how many, in what time, by which method."""
        return (
            f"{self.tokens_before:,} -> {self.tokens_after:,} tokens ({self.rate:.1%} kept) "
            f"in {self.seconds:.2f} s by {self.method or 'no method'}"
        )


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Compressed text</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em; }}
del {{ color: #b33; opacity: .55; }}
</style>
<p>{summary}</p>
{shown}
</html>
"""
