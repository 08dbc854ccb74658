"""Plan: which methods run at which stage. Parses from a line of text, YAML and keywords; prints back the same."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ThriftError, did_you_mean
from .method import STAGES, MethodInfo, find


@dataclass(frozen=True)
class Step:
    """One method with its parameters, e.g. ``cache=snapkv(budget=512)``.

    ``given`` names the parameters that were written out: they are printed even where they are the defaults.
    """

    stage: str
    method: Any
    given: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @property
    def info(self) -> MethodInfo:
        info: MethodInfo = self.method.info
        return info

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def params(self) -> dict[str, Any]:
        """The parameters that were given or differ from the defaults."""
        changed = self.changed
        return {k: getattr(self.method, k) for k in self.info.defaults if k in changed or k in self.given}

    @property
    def changed(self) -> dict[str, Any]:
        """The parameters that differ from the defaults: what makes two steps of one method different."""
        # Compared as printed: 1 and 1.0 are different budgets, and nan equals nan.
        values = ((k, getattr(self.method, k), default) for k, default in self.info.defaults.items())
        return {k: v for k, v, default in values if repr(v) != repr(default)}

    def __str__(self) -> str:
        return f"{self.stage}={self.name}({', '.join(f'{k}={v!r}' for k, v in self.params.items())})"


class Plan:
    """Steps in the order given. Made by :meth:`parse`, :meth:`of`, or keywords: ``Plan(cache="snapkv(budget=512)")``.

    A keyword's value is a method call as text, a mapping ``{"snapkv": {"budget": 512}}``, a method instance, or a list
    of these. Unknown stages, methods and parameters raise ThriftError, one line with the nearest name.
    """

    def __init__(self, steps: tuple[Step, ...] | list[Step] = (), **stages: Any) -> None:
        if not all(isinstance(step, Step) for step in steps):
            raise ThriftError(f"cannot read {steps!r} as steps: use Plan.of(...) or Plan(stage=...)")
        self.steps: tuple[Step, ...] = (*steps, *_steps_of(stages))

    @classmethod
    def parse(cls, text: str) -> Plan:
        """From a line such as ``"connector=divprune(keep=0.25) cache=snapkv(budget=512)"``, or from YAML.

        The stage may be left out (``"snapkv(budget=512)"``): a method belongs to one.
        """
        text = text.strip()
        if text in ("", "{}", "none", "baseline"):
            return cls()
        if ":" in text and "=" not in text.split(":")[0]:
            return cls.from_yaml(text)
        return cls(steps=[_step(*_stage_and_call(word)) for word in _split(text)])

    @classmethod
    def from_yaml(cls, text: str) -> Plan:
        """From YAML: ``stage: {method: {param: value}}``, or ``stage: method``, or a list of these."""
        data = load_yaml(text)
        return cls.parse(data) if isinstance(data, str) else cls.of(data)

    @classmethod
    def of(cls, value: Plan | str | os.PathLike[str] | Mapping[str, Any] | None) -> Plan:
        """From whatever a user has: a plan, text, the path of a YAML file, a mapping, or None (the empty plan)."""
        if isinstance(value, Plan):
            return value
        if value is None:
            return cls()
        if isinstance(value, Mapping):
            return cls(steps=tuple(_steps_of(value)))
        if (text := file_text(value)) is not None:
            return cls.from_yaml(text)
        if isinstance(value, str):
            return cls.parse(value)
        raise ThriftError(f"a plan is text, a mapping or a YAML file, not {type(value).__name__}")

    def to_yaml(self) -> str:
        """YAML that :meth:`from_yaml` reads back to an equal plan."""
        import yaml

        data: dict[str, Any] = {}
        for step in self.steps:
            call: Any = {step.name: step.params} if step.params else step.name
            data.setdefault(step.stage, []).append(call if _is_yaml(step.params) else str(step).split("=", 1)[1])
        flat = {stage: calls[0] if len(calls) == 1 else calls for stage, calls in data.items()}
        return yaml.safe_dump(flat, sort_keys=False) if flat else "{}\n"

    def at(self, stage: str) -> list[Any]:
        """The method instances of one stage, in order."""
        return [s.method for s in self.steps if s.stage == stage]

    @property
    def stages(self) -> list[str]:
        """The stages that the plan uses, in the order in which a request meets them."""
        return [s for s in STAGES if any(step.stage == s for step in self.steps)]

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __bool__(self) -> bool:
        return bool(self.steps)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[str, ...]:
        """What makes two plans equal: the same methods with the same parameters, in the same order within a stage."""
        return tuple(f"{s.stage}={s.name}({s.changed})" for stage in STAGES for s in self.steps if s.stage == stage)

    def __str__(self) -> str:
        return " ".join(map(str, self.steps))

    def __repr__(self) -> str:
        return f"Plan.parse({str(self)!r})"


def file_text(value: Any) -> str | None:
    """The text of a plan file, if ``value`` is a path or names a YAML file; else None."""
    if not (isinstance(value, os.PathLike) or (isinstance(value, str) and value.endswith((".yaml", ".yml")))):
        return None
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ThriftError(f"cannot read the plan file {os.fspath(value)}: {error}") from None


def load_yaml(text: str, name: str = "the plan") -> Any:
    """The data of a YAML text, called ``name`` in the error."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ThriftError(f"{name} is not valid YAML: {error}") from None


def _stage_and_call(word: str) -> tuple[str, str]:
    """``cache=snapkv()`` to its two halves; the stage may be left out, since a method's name says it."""
    if "=" in word.split("(")[0]:
        stage, call = word.split("=", 1)
        return stage.strip(), call.strip()
    return find(_parse_call(word)[0]).stage, word


def _steps_of(stages: Mapping[str, Any]) -> list[Step]:
    """Steps of the keyword and YAML forms."""
    return [_step(str(stage), call) for stage, calls in stages.items() for call in _as_list(calls)]


def _as_list(calls: Any) -> list[Any]:
    if isinstance(calls, list | tuple):
        return list(calls)
    if isinstance(calls, Mapping):
        return [{name: params} for name, params in calls.items()]
    return [calls]


def _step(stage: str, call: Any) -> Step:
    if stage not in STAGES:
        raise ThriftError(f"unknown stage '{stage}': {did_you_mean(stage, STAGES)}")
    if isinstance(getattr(type(call), "info", None), MethodInfo):
        if call.info.stage != stage:
            raise ThriftError(f"{call.info.name} is a method of stage '{call.info.stage}', not '{stage}'")
        return Step(stage, call)
    if isinstance(call, Mapping) and len(call) == 1:
        name, params = next(iter(call.items()))
    elif isinstance(call, str):
        name, params = _parse_call(call)
    else:
        raise ThriftError(f"cannot read {call!r} at stage '{stage}': write method(param=value)")
    if params is not None and not isinstance(params, Mapping):
        raise ThriftError(f"the parameters of {name} must be named: write {name}(param=value)")
    named = {str(k): v for k, v in (params or {}).items()}
    return Step(stage, find(str(name), stage).make(**named), given=tuple(named))


def _parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """``snapkv(budget=512)`` or ``snapkv`` to a name and its parameters; bare words are strings."""
    text = text.strip()
    try:
        node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # also null bytes, and brackets nested too deep
        raise ThriftError(f"cannot read '{text}': write method(param=value, ...)") from None
    if isinstance(node, ast.Name):
        return node.id, {}
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise ThriftError(f"cannot read '{text}': write method(param=value, ...)")
    if node.args or any(k.arg is None for k in node.keywords):
        raise ThriftError(f"the parameters of {node.func.id} must be named: write {node.func.id}(param=value)")
    params = {str(k.arg): _value(k.value, text) for k in node.keywords}
    if len(params) < len(node.keywords):
        raise ThriftError(f"a parameter of {node.func.id} is given twice in '{text}'")
    return node.func.id, params


_WORDS = {"true": True, "false": False, "none": None, "nan": float("nan"), "inf": float("inf")}


def _value(node: ast.expr, text: str) -> Any:
    """The value of a literal; nothing is ever evaluated."""
    match node:
        case ast.Name(id=word):
            return _WORDS.get(word, word)
        case ast.Constant(value=value) if isinstance(value, str | int | float | None):
            return value
        case ast.List(elts=items):
            return [_value(item, text) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item, text) for item in items)
        case ast.Dict(keys=keys, values=values) if all(isinstance(k, ast.Constant) for k in keys):
            return {_value(k, text): _value(v, text) for k, v in zip(keys, values, strict=True) if k}
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant() | ast.Name() as operand):
            value = _value(operand, text)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return -value
    said = ast.get_source_segment(text, node)
    raise ThriftError(f"cannot read the value '{said}' in '{text}': use numbers, words or lists")


def _is_yaml(value: Any) -> bool:
    """True for what YAML reads back as it was written; tuples, for one, it does not know."""
    if type(value) is dict:
        return all(type(k) is str and _is_yaml(v) for k, v in value.items())
    if type(value) is list:
        return all(map(_is_yaml, value))
    return type(value) in (str, int, float, bool, type(None))


def _split(text: str) -> list[str]:
    """Split at white space outside brackets and quotes."""
    words, depth, quote, start, escaped = [], 0, "", None, False
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote and not escaped else quote
            escaped = c == "\\" and not escaped
        elif c in "'\"":
            quote = c
        else:
            depth += (c in "([{") - (c in ")]}")
        if c.isspace() and depth <= 0 and not quote:
            if start is not None:
                words.append(text[start:i])
            start = None
        elif start is None:
            start = i
    if depth != 0 or quote:
        raise ThriftError(f"a bracket or quote is not closed in the plan '{text}'")
    return [*words, text[start:]] if start is not None else words
