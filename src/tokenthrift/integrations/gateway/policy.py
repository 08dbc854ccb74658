"""The policy file of the gateway: what is shortened, how, within which limits, and what a token costs."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import yaml

from ...core.errors import ThriftError, did_you_mean

ROLES = ("user", "assistant", "tool", "function")
"""Whose messages may be shortened. System and developer prompts and tool schemas never are."""
T = TypeVar("T")


@dataclass(frozen=True)
class Route:
    """What happens to the requests that it fits; the first one that fits counts.

    Attributes:
        path: glob on the path that the client asks for, such as ``/v1/chat/completions``.
        model: glob on the request's model.
        method: a text method, or None to leave the prompts alone.
        rate: share of each text's tokens to keep, or a number of tokens.
        params: more parameters of the method.
        protect: kinds of text that must survive, passed to ``tokenthrift.compress``; None for its default.
        roles: whose messages may be shortened.
        last_user: shorten the last user turn as well, and the prompts of ``/v1/completions``. They hold the
            instructions, but for clients that send one message of documents and question they are all there is.
        question: ``"last_user"`` tells the method the last user turn, for methods that look at a question. What
            earlier turns become then changes with each turn, so that a provider's prompt cache is missed.
        min_chars: shorter texts are left alone.
        time_budget: seconds that shortening may take, before the request goes out unchanged.
        name: in ``/metrics`` and ``/stats``; the method and a number where it is empty.
    """

    path: str = "/v1/*"
    model: str = "*"
    method: str | None = None
    rate: float | int = 0.5
    params: dict[str, Any] = field(default_factory=dict)
    protect: Any = None
    roles: tuple[str, ...] = ("user",)
    last_user: bool = False
    question: str | None = None
    min_chars: int = 1000
    time_budget: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        for text in ("path", "model", "name"):
            if not isinstance(getattr(self, text), str):
                raise ThriftError(f"{text} is {getattr(self, text)!r}: write a text in quotes")
        if isinstance(self.roles, str) or not isinstance(self.roles, tuple | list):
            raise ThriftError(f"roles is {self.roles!r}: write a list such as [user, tool]")
        for role in self.roles:
            if role not in ROLES:
                raise ThriftError(f"roles has {role!r}: the roles that can be shortened are {', '.join(ROLES)}")
        object.__setattr__(self, "roles", tuple(self.roles))
        if not isinstance(self.last_user, bool):
            raise ThriftError(f"last_user is {self.last_user!r}: write true or false")
        if self.question not in (None, "last_user"):
            raise ThriftError(f"question is {self.question!r}: write last_user, or leave it out")
        if not isinstance(self.params, Mapping):
            raise ThriftError("params must be a mapping such as {level: sentence}")
        _number("min_chars", self.min_chars, 0, whole=True)
        _number("time_budget", self.time_budget, 0, 600, above=True)
        if self.method is not None:
            self._check_method()

    def _check_method(self) -> None:
        from ...core.method import find

        if not isinstance(self.method, str):
            raise ThriftError(f"method is {self.method!r}: write the name of one text method")
        find(self.method, "text").make(rate=self.rate, **self.params)
        if self.protect is not None:
            if not compress_takes("protect"):
                raise ThriftError("protect is not known to this version of tokenthrift.compress: leave it out")
            from ...text.protect import Protection

            Protection.of(self.protect)

    def fits(self, path: str, model: str) -> bool:
        """Whether a request is one of this route's."""
        return fnmatchcase(path, self.path) and fnmatchcase(model, self.model)


@dataclass(frozen=True)
class Limits:
    """What a client may ask of the gateway; beyond it the answer is an error of OpenAI's form.

    Attributes:
        body_mb: size of a request.
        messages: entries of ``messages`` (or ``prompt``, or ``input``).
        concurrent: requests at a time.
        body_seconds: until the request's body has come.
        seconds: from then to the last byte of the answer.
        connect_seconds: until the upstream takes the connection.
        idle_seconds: between two pieces of the upstream's answer, and before the first.
    """

    body_mb: float = 8
    messages: int = 2000
    concurrent: int = 512
    seconds: float = 900
    body_seconds: float = 60
    connect_seconds: float = 10
    idle_seconds: float = 300

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _number(f.name, getattr(self, f.name), 0, above=True, whole=f.name in ("messages", "concurrent"))


@dataclass(frozen=True)
class Policy:
    """All that the gateway is told.

    Attributes:
        upstream: the only address that the gateway talks to: what a client would have as its base URL.
        routes: the first that fits a request counts; where none fits, the request goes through as it is.
        prices: US dollars a million input tokens, by glob on the model's name; the first that fits counts.
        tokenizer: model pack, folder or hub id of the tokenizer that counts, or ``tiktoken:NAME``.
        scorer: model pack, folder or hub id of the model for methods that need one.
        workers: texts that are shortened at a time.
        processes: workers are processes of their own, so that the gateway answers while they compute, and one that
            hangs can be ended; false for a thread, which is enough where methods are quick.
        page: serve the page at ``/``, ``/stats`` and ``/preview``.
    """

    upstream: str
    routes: tuple[Route, ...] = ()
    prices: tuple[tuple[str, float], ...] = ()
    limits: Limits = field(default_factory=Limits)
    tokenizer: str = "smollm2-135m"
    scorer: str = "smollm2-135m"
    workers: int = 1
    processes: bool = True
    page: bool = True

    def __post_init__(self) -> None:
        _check_upstream(self.upstream)
        _number("workers", self.workers, 1, 256, whole=True)
        for name in ("processes", "page"):
            if not isinstance(getattr(self, name), bool):
                raise ThriftError(f"{name} is {getattr(self, name)!r}: write true or false")
        if not self.processes and self.workers > 1:
            raise ThriftError("threads share one tokenizer, which serves one at a time: write workers: 1")
        for name in ("tokenizer", "scorer"):
            if not isinstance(getattr(self, name), str):
                raise ThriftError(f"{name} is {getattr(self, name)!r}: write a model pack, a folder or a hub id")
        named = [r if r.name else dataclasses.replace(r, name=_name(r, i)) for i, r in enumerate(self.routes, 1)]
        names = [route.name for route in named]
        if double := next((name for name in names if names.count(name) > 1), None):
            raise ThriftError(f"two routes are called {double!r}: give each a name of its own")
        object.__setattr__(self, "routes", tuple(named))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """From a YAML file."""
        from ...text.files import read_text

        try:
            data = yaml.safe_load(read_text(path))
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f" (line {mark.line + 1})" if mark else ""
            raise ThriftError(f"{os.fspath(path)} is no YAML{where}: {getattr(error, 'problem', error)}") from None
        try:
            return cls.of(data)
        except ThriftError as error:
            raise ThriftError(f"{Path(path).name}: {error}") from None

    @classmethod
    def of(cls, data: Any) -> Policy:
        """From plain data, as YAML gives it."""
        data = _mapping(data, "the policy")
        if "upstream" not in data:
            raise ThriftError("the policy names no upstream: write upstream: https://api.openai.com/v1")
        routes = data.get("routes") or []
        if not isinstance(routes, list):
            raise ThriftError("routes must be a list: write each route with a dash before it")
        made: dict[str, Any] = {**data, "routes": tuple(_make(Route, r, f"route {i}") for i, r in enumerate(routes, 1))}
        made["limits"] = _make(Limits, data.get("limits") or {}, "limits")
        made["prices"] = _prices(data.get("prices") or {})
        return _make(cls, made, "the policy")

    def route(self, path: str, model: str) -> Route | None:
        """The first route that fits."""
        return next((route for route in self.routes if route.fits(path, model)), None)

    def price(self, model: str) -> float | None:
        """Of an input token, in US dollars."""
        return next((price / 1e6 for pattern, price in self.prices if fnmatchcase(model, pattern)), None)


def compress_takes(argument: str) -> bool:
    """Whether ``tokenthrift.compress`` has an argument of that name, beside those of the methods."""
    from ...api import compress

    return argument in inspect.signature(compress).parameters


def _name(route: Route, number: int) -> str:
    return f"{number}-{route.method or 'unchanged'}"


def _check_upstream(address: Any) -> None:
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except (ValueError, AttributeError, TypeError):
        good = False
    if not good:
        raise ThriftError(f"upstream is {address!r}: write an address such as https://api.openai.com/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ThriftError("upstream must have no user, password, query or fragment: clients send their own key")


def _prices(data: Any) -> tuple[tuple[str, float], ...]:
    prices = _mapping(data, "prices")
    for model, price in prices.items():
        _number(f"prices: {model}", price, 0)
    return tuple((str(model), float(price)) for model, price in prices.items())


def _make(cls: type[T], data: Any, where: str) -> T:
    data = _mapping(data, where)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in data:
        if name not in known:
            raise ThriftError(f"{where} has no '{name}': {did_you_mean(str(name), known)}")
    try:
        return cls(**data)
    except ThriftError as error:
        raise error if where == "the policy" else ThriftError(f"{where}: {error}") from None


def _mapping(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ThriftError(f"{where} is {type(data).__name__}, not a mapping: write lines of the form name: value")
    return dict(data)


def _number(
    name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False, whole: bool = False
) -> None:
    kinds = int if whole else (int, float)
    inside = not isinstance(value, bool) and isinstance(value, kinds) and low <= value <= high and value < math.inf
    if not inside or (above and value == low):
        what = "a whole number" if whole else "a number"
        bounds = f"{'above' if above else 'of at least'} {low}" + (f" and at most {high}" if high < math.inf else "")
        raise ThriftError(f"{name} is {value!r}: write {what} {bounds}")
