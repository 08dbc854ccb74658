"""Constraints: which token may follow what was generated so far, or whether the text may end there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from ..core.errors import ThriftError


class State(Protocol):
    """A constraint after some tokens. States are never changed: particles share them."""

    def accepts(self, token: int) -> bool:
        """Whether ``token`` may come next; of an end-of-sequence token, whether the text may end here."""

    def then(self, token: int) -> State:
        """The state after ``token``, which was accepted."""

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""


class Constraint(Protocol):
    """What :class:`~tokenthrift.decoding.awrs.Awrs` takes as ``constraint``."""

    def start(self, tokenizer: Any, vocabulary: int, ends: frozenset[int]) -> State:
        """The state before the first token, for a model with so many tokens and these end-of-sequence tokens."""


def constraint_of(what: Any, text: bool) -> Constraint:
    """A constraint as it is, or made of a callable ``accept(prefix, token)``; see :class:`Predicate`."""
    if hasattr(what, "start"):
        return what  # type: ignore[no-any-return]
    if not callable(what):
        raise ThriftError(f"a constraint is a callable accept(prefix, token) or has start(...), not {what!r}")
    return Predicate(what, text)


# ---- callables ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predicate:
    """A callable ``accept(prefix, token) -> bool``, asked about one token at a time.

    Args:
        accept: with ``text`` it gets the text generated so far and what the token adds, ``""`` for the end; else a
            tuple of token ids, and the token's id. The prompt is in neither.
    """

    accept: Callable[[Any, Any], bool]
    text: bool = False

    def start(self, tokenizer: Any, vocabulary: int, ends: frozenset[int]) -> PredicateState:
        if self.text and not hasattr(tokenizer, "decode"):
            raise ThriftError("a constraint on text needs the tokenizer: pass it as processor=")
        return PredicateState(self, tokenizer if self.text else None, ends)


@dataclass(frozen=True)
class PredicateState:
    """The tokens so far, and their text as far as its characters are whole."""

    rule: Predicate
    tokenizer: Any
    ends: frozenset[int]
    tokens: tuple[int, ...] = ()
    text: str = ""

    def accepts(self, token: int) -> bool:
        if self.tokenizer is None:
            return bool(self.rule.accept(self.tokens, token))
        if token in self.ends:
            whole = self.tokenizer.decode(self.tokens) == self.text if self.tokens else True
            return whole and bool(self.rule.accept(self.text, ""))
        more = self.tokenizer.decode((*self.tokens, token))
        if more == self.text + _CUT:
            return True  # a part of a character: asked about when it is whole
        return len(more) > len(self.text) and bool(self.rule.accept(self.text, more[len(self.text) :]))

    def then(self, token: int) -> PredicateState:
        tokens, text = (*self.tokens, token), self.text
        if self.tokenizer is not None and (more := self.tokenizer.decode(tokens)) != text + _CUT:
            text = more
        return PredicateState(self.rule, self.tokenizer, self.ends, tokens, text)

    @property
    def complete(self) -> bool:
        return any(self.accepts(end) for end in self.ends)


_CUT = "\ufffd"  # what a part of a character decodes to


# ---- grammars -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grammar:
    """A regular expression that the whole text matches, or a JSON schema that it fulfils, by ``llguidance``.

    Raises:
        ThriftError: (at ``start``) no ``llguidance``, a tokenizer that it does not know, a grammar with an error or one
            that no text satisfies.
    """

    kind: str
    source: str

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        return cls("regex", pattern)

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any]) -> Grammar:
        """From the schema, as JSON text or as data, or from the path of a ``.json`` file."""
        if isinstance(schema, Mapping):
            return cls("json_schema", json.dumps(schema))
        try:
            text = Path(schema).read_text(encoding="utf-8") if schema.endswith(".json") else schema
            json.loads(text)
        except (OSError, ValueError) as error:
            raise ThriftError(f"json_schema is neither JSON nor the path of a .json file: {error}") from None
        return cls("json_schema", text)

    def start(self, tokenizer: Any, vocabulary: int, ends: frozenset[int]) -> GrammarState:
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise ThriftError(
                f"{self.kind} constraints need llguidance ({error}): pip install 'tokenthrift[constrained]'"
            ) from error
        if tokenizer is None:
            raise ThriftError(f"{self.kind} constraints need the tokenizer: pass it as processor=")
        try:
            made = getattr(LLMatcher, f"grammar_from_{self.kind}")(self.source)
            matcher = LLMatcher(_tokens(tokenizer, vocabulary, ends), made, log_level=0)
        except (ValueError, TypeError) as error:
            raise ThriftError(f"the {self.kind} constraint cannot be used: {error}") from None
        if matcher.is_error():
            raise ThriftError(f"the {self.kind} constraint cannot be used: {matcher.get_error()}")
        return GrammarState(matcher, ends)


@lru_cache(maxsize=4)  # a second of work each; the tokenizer is hashed by what it is
def _tokens(tokenizer: Any, vocabulary: int, ends: frozenset[int]) -> Any:
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, n_vocab=max(vocabulary, len(tokenizer)), eos_token=sorted(ends) or None)


@dataclass(frozen=True)
class GrammarState:
    """A matcher, copied before it moves on."""

    matcher: Any
    ends: frozenset[int]

    def accepts(self, token: int) -> bool:
        return self.complete if token in self.ends else self.matcher.validate_tokens([token]) == 1

    def then(self, token: int) -> GrammarState:
        matcher = self.matcher.deep_copy()
        matcher.consume_token(token)
        return GrammarState(matcher, self.ends)

    @property
    def complete(self) -> bool:
        return bool(self.matcher.is_accepting())
