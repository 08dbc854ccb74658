"""The method registry: one decorator turns a small class into a method that plans, the bench and the CLI know."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar, cast, dataclass_transform

from .errors import ThriftError, did_you_mean

STAGES = (
    "text", "vocab", "vision", "connector", "prefill", "cache", "attention", "decode", "diffusion", "codec", "training",
)  # fmt: skip
"""Where tokens can be reduced, in the order in which a request meets them."""

FAMILIES = (
    "text",
    "vocab",
    "vision",
    "multimodal",
    "prefill",
    "cache",
    "attention",
    "decoding",
    "diffusion",
    "codecs",
    "training",
)
"""Sub-packages that are searched for methods: adding a file to one of them adds its methods."""

_registry: dict[str, MethodInfo] = {}
T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a method without running it.

    Attributes:
        name: how plans call it.
        stage: one of :data:`STAGES`.
        paper: title of the paper, ``arxiv`` its id.
        needs: names of the view's parts that the method reads.
        status: ``"checked"`` against the authors' code, or ``"partial"``: the docstring says what is assumed.
        cls: the class; its fields are the parameters.
    """

    name: str
    stage: str
    paper: str
    arxiv: str | None
    needs: tuple[str, ...]
    status: str
    cls: type = field(repr=False)

    @property
    def defaults(self) -> dict[str, Any]:
        """Parameters and their default values; a required one has the value ``...``."""
        return {
            f.name: f.default
            if f.default is not MISSING
            else f.default_factory()
            if f.default_factory is not MISSING
            else ...
            for f in dataclasses.fields(self.cls)
            if f.init
        }

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (self.cls.__doc__ or "").strip().split("\n")[0]

    def make(self, **params: Any) -> Any:
        """An instance with these parameters. Raises ThriftError for unknown, missing and mistyped ones."""
        defaults = self.defaults
        for name in params:
            if name not in defaults:
                raise ThriftError(f"{self.name} has no parameter '{name}': {did_you_mean(name, defaults)}")
        for name, default in defaults.items():
            if default is ... and name not in params:
                raise ThriftError(f"{self.name} needs the parameter '{name}': write {self.name}({name}=...)")
        for f in dataclasses.fields(self.cls):
            if f.name in params and not _fits(params[f.name], f.type):
                kind = " or ".join(_words(f.type))
                raise ThriftError(f"{self.name} takes '{f.name}' as {kind}, got {params[f.name]!r}")
            if isinstance(params.get(f.name), int) and params[f.name].bit_length() > 63:
                raise ThriftError(f"{self.name} '{f.name}' has more than 64 bits: write a smaller number")
        return self.cls(**params)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for ``--json``; what JSON has no word for is text, as a plan would write it."""
        plain = {k: v for k, v in vars(self).items() if k != "cls"}
        defaults = {k: _plain(v) for k, v in self.defaults.items() if v is not ...}
        required = [k for k in self.defaults if k not in defaults]
        return {**plain, "needs": list(self.needs), "defaults": defaults, "required": required, "summary": self.summary}


_KINDS: dict[str, tuple[type, ...]] = {
    "bool": (bool,), "int": (int,), "float": (int, float), "str": (str,), "None": (type(None),)
}  # fmt: skip


def _words(annotation: Any) -> list[str]:
    """The parts of a union as the source writes them: ``int | float`` to ``["int", "float"]``."""
    return (annotation.__name__ if isinstance(annotation, type) else str(annotation)).split(" | ")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is what a field is annotated to hold; what is not made of plain types may hold anything."""
    words = _words(annotation)
    if not set(words) <= set(_KINDS):
        return True
    return any(isinstance(value, _KINDS[w]) and (w == "bool" or not isinstance(value, bool)) for w in words)


def _plain(value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return repr(value)
    return value


@dataclass_transform(kw_only_default=True, frozen_default=True)
def method(
    name: str,
    *,
    stage: str,
    paper: str,
    arxiv: str | None = None,
    needs: tuple[str, ...] = (),
    status: str = "checked",
) -> Callable[[T], T]:
    """Declare a method. The class becomes a frozen keyword-only dataclass whose fields are the method's parameters.

    Methods of the stages that keep or merge tokens have ``reduce(self, view: View) -> TokenMap``; those of the decode
    stage have ``start(self, tokens: Sequence[int]) -> Drafter``. A method never touches a model.
    """
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}: {did_you_mean(stage, STAGES)}")
    if not name.isidentifier():
        raise ValueError(f"plans cannot call a method {name!r}: use letters, digits and underscores")

    def register(cls: T) -> T:
        made: Any = dataclass(frozen=True, kw_only=True)(cls)
        known = _registry.get(name)
        if known is not None and (known.cls.__module__, known.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"two methods are called {name!r}: {known.cls.__module__} and {cls.__module__}")
        _registry[name] = MethodInfo(name, stage, paper, arxiv, needs, status, made)
        made.info = _registry[name]
        return cast("T", made)

    return register


@cache
def _discover() -> None:
    """Import every family's modules, and what other packages offer as entry points ``tokenthrift.methods``."""
    for family in FAMILIES:
        try:
            package = importlib.import_module(f"tokenthrift.{family}")
        except ModuleNotFoundError as error:
            if error.name != f"tokenthrift.{family}":
                raise
            continue  # a family that has no methods yet
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    for entry in entry_points(group="tokenthrift.methods"):
        try:
            entry.load()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise ThriftError(f"the plugin '{entry.name}' ({entry.value}) cannot be imported: {said}") from error


def methods(stage: str | None = None) -> list[MethodInfo]:
    """All known methods, or those of one stage, in the order of :data:`STAGES`, then by name."""
    if stage is not None and stage not in STAGES:
        raise ThriftError(f"unknown stage '{stage}': {did_you_mean(stage, STAGES)}")
    _discover()
    found: Iterator[MethodInfo] = (m for m in _registry.values() if stage in (None, m.stage))
    return sorted(found, key=lambda m: (STAGES.index(m.stage), m.name))


def find(name: str, stage: str | None = None) -> MethodInfo:
    """The method of this name. Raises ThriftError with the nearest name, or with the stage where it belongs."""
    _discover()
    info = _registry.get(name)
    if info is None:
        names = [m.name for m in methods(stage)] or list(_registry)
        raise ThriftError(
            f"unknown method '{name}'{f' at stage {stage}' if stage else ''}: {did_you_mean(name, names)}"
        )
    if stage is not None and info.stage != stage:
        raise ThriftError(f"{name} is a method of stage '{info.stage}', not '{stage}': write {info.stage}={name}(...)")
    return info
