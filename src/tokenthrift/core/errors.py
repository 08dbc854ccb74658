"""The one exception that means "the user can fix this": one line that says what was wrong and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ThriftError(ValueError):
    """A mistake in what the user asked for. The command line prints it as one line and exits with code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # what it quotes may have line breaks


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A tail for error messages: the nearest known name, or all of them when there are few."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known: {', '.join(known)}" if known else "none are known"


def check_choice(name: str, parameter: str, value: object, known: Iterable[str]) -> None:
    """Refuse a value of a method's parameter that is none of these."""
    if value not in (known := list(known)):
        raise ThriftError(f"{name} has no {parameter} '{value}': {did_you_mean(str(value), known)}")
