"""Session: a plan applied to a model. Installs through the model's adapter, records, and restores exactly."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import reduce
from types import TracebackType
from typing import Any, Protocol

import torch

from .errors import ThriftError
from .plan import Plan
from .tokenmap import TokenMap

MOST_ROWS = 9
"""Of each kind of tally in a report that is read; the rest is summed. ``to_dict`` has them all."""


class Adapter(Protocol):
    """Where the stages are in one family of models: the only code that knows model classes."""

    @property
    def model(self) -> Any:
        """The ``transformers`` model."""

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that this adapter can install."""

    def install(self, stage: str, methods: list[Any], session: Session, undo: ExitStack) -> None:
        """Attach the methods of a stage; register every change's exact reversal on ``undo`` before making it."""


@dataclass
class Tally:
    """How many guesses were tried, and how many of these accepted."""

    tried: int = 0
    accepted: int = 0

    @property
    def share(self) -> float:
        """Of those tried, the accepted ones."""
        return self.accepted / self.tried if self.tried else 0.0

    def add(self, tried: int, accepted: int) -> None:
        """Count more."""
        self.tried += tried
        self.accepted += accepted


@dataclass
class StageRecord:
    """Totals of one stage over the session (sums over calls, layers, heads and batch rows).

    Attributes:
        extra: what else a stage has to say, by name.
        tallies: of guesses: by what they are counted by (``"source"``, ``"depth"``), then by its value, how many were
            tried and how many of these accepted.
    """

    calls: int = 0
    tokens_before: int = 0
    tokens_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)
    tallies: dict[str, dict[str, Tally]] = field(default_factory=dict)

    @property
    def kept(self) -> float:
        """Share of tokens (or cache entries) kept."""
        return self.tokens_after / self.tokens_before if self.tokens_before else 1.0

    def tally(self, by: str, value: str, tried: int, accepted: int) -> None:
        """Add guesses to those counted so far."""
        self.tallies.setdefault(by, {}).setdefault(value, Tally()).add(tried, accepted)


@dataclass
class Report:
    """What a session did. ``flops_dense`` is what the same forwards would have cost without the plan (analytic)."""

    plan: str
    forwards: int
    flops: float
    flops_dense: float
    stages: dict[str, StageRecord]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        stages = {}
        for name, r in self.stages.items():
            stages[name] = {**asdict(r), "kept": r.kept}
            stages[name]["tallies"] = {
                by: {value: {**asdict(t), "share": t.share} for value, t in tallies.items()}
                for by, tallies in r.tallies.items()
            }
        return {**vars(self), "stages": stages}

    def to_markdown(self) -> str:
        """A table with a row a stage; what else the stages have to say below it."""
        lines = [
            f"plan: `{self.plan or 'none'}`; {self.forwards} forwards, "
            f"{self.flops / 1e9:.2f} GFLOPs ({self.flops_dense / 1e9:.2f} without the plan)",
            "",
            "| stage | calls | tokens before | after | kept | MB before | MB after | seconds |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for name, r in self.stages.items():
            lines.append(
                f"| {name} | {r.calls} | {r.tokens_before:,} | {r.tokens_after:,} | {r.kept:.1%} | "
                f"{r.bytes_before / 1e6:.2f} | {r.bytes_after / 1e6:.2f} | {r.seconds:.4f} |"
            )
        for name, r in self.stages.items():
            if r.extra:
                lines += ["", f"{name}: " + ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in r.extra.items())]
            if r.tallies:
                lines += ["", f"| {name}, guesses by | tried | accepted | share |", "|---|--:|--:|--:|"]
                for by, tallies in r.tallies.items():
                    lines += [f"| {by} {v} | {t.tried:,} | {t.accepted:,} | {t.share:.1%} |" for v, t in _few(tallies)]
        return "\n".join(lines)

    __str__ = to_markdown


class Session:
    """A context manager: inside the ``with`` block the plan acts on the model, after it the model is as it was.

    ``records`` fill while the user's own calls run; :meth:`report` and :meth:`provenance` can be read inside and after.
    """

    def __init__(
        self,
        plan: Plan,
        adapter: Adapter,
        compressor: Callable[..., Any] | None = None,
        processor: Any = None,
        linears: str = "auto",
    ) -> None:
        # Text is reduced before it is tokenised, so no adapter installs it: `compress` is called by the user.
        self._stages = [s for s in plan.stages if s != "text"]
        for stage in self._stages:
            if stage not in adapter.stages:
                raise ThriftError(
                    f"{type(adapter.model).__name__} has no stage '{stage}' here; "
                    f"it offers: {', '.join(dict.fromkeys(('text', *adapter.stages)))}"
                )
        self.plan = plan
        self.adapter = adapter
        self.processor = processor
        self.linears = "torch"  # the product in use, once installed
        self.copied_bytes = 0  # of weights, for it
        self._linears = linears if linears != "auto" or "decode" in plan.stages else "torch"
        self.records: dict[str, StageRecord] = {}
        self.forwards = 0
        self.flops = self.flops_dense = 0.0
        self._compressor = compressor
        self._chains: dict[str, list[TokenMap]] = {}
        self._parallel: dict[str, dict[int, TokenMap]] = {}
        self._undo: ExitStack | None = None

    # ---- life -------------------------------------------------------------------------------------------------------

    def install(self) -> Session:
        """Attach the plan (what entering the ``with`` block does)."""
        if self._undo is not None:
            raise ThriftError("this session is already installed; leave its with block before entering it again")
        with ExitStack() as undo:  # on an error half-way everything done so far is undone
            _compile_anew(undo)
            if self._linears != "torch":
                from ..models.linears import use_product

                self.linears, self.copied_bytes = use_product(self.adapter.model, self._linears, undo)
            for stage in self._stages:
                self.adapter.install(stage, self.plan.at(stage), self, undo)
            self._undo = undo.pop_all()
        return self

    def remove(self) -> None:
        """Restore the model exactly (what leaving the ``with`` block does)."""
        if self._undo is not None:
            undo, self._undo = self._undo, None
            undo.close()

    def __enter__(self) -> Session:
        return self.install()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    # ---- what runtimes write ----------------------------------------------------------------------------------------

    def record(
        self, stage: str, *, before: int, after: int, bytes_before: int = 0, bytes_after: int = 0, seconds: float = 0.0
    ) -> StageRecord:
        """Add one reduction to the totals of its stage."""
        r = self.records.setdefault(stage, StageRecord())
        r.calls += 1
        r.tokens_before += before
        r.tokens_after += after
        r.bytes_before += bytes_before
        r.bytes_after += bytes_after
        r.seconds += seconds
        return r

    def start_maps(self, stage: str) -> None:
        """A new top-level forward begins: forget the stage's maps of the last one."""
        self._chains.pop(stage, None)
        self._parallel.pop(stage, None)

    def add_map(self, stage: str, map: TokenMap, layer: int | None = None) -> None:
        """Note a map for provenance: chained after the stage's earlier ones, or for one layer beside others."""
        if layer is None:
            self._chains.setdefault(stage, []).append(map)
        else:
            self._parallel.setdefault(stage, {})[layer] = map

    def maps(self, stage: str) -> list[TokenMap]:
        """The chained maps of a stage in the last forward, in their order."""
        return list(self._chains.get(stage, ()))

    def count_forward(self, flops: float, dense: float) -> None:
        """Add the analytic cost of one forward, with the plan and without it."""
        self.forwards += 1
        self.flops += flops
        self.flops_dense += dense

    # ---- what users read --------------------------------------------------------------------------------------------

    def compress(self, text: str, question: str | None = None, *, protect: Any = None) -> Any:
        """Apply the plan's text stage to a prompt: a ``CompressedText`` (its ``.text`` is the prompt to tokenise).

        The methods run as they were published, which is what ``tokenthrift bench`` compares; with ``protect``, e.g.
        ``"default"``, what it names survives, as in :func:`tokenthrift.compress`, and the result is checked.
        """
        if self._compressor is None:
            raise ThriftError(
                "compress needs the tokenizer: pass it as tokenthrift.apply(plan, model, processor=tokenizer)"
            )
        out = self._compressor(
            self.plan.at("text"), text, question, **({} if protect is None else {"protect": protect})
        )
        self.record("text", before=out.tokens_before, after=out.tokens_after, seconds=out.seconds)
        self.start_maps("text")
        self.add_map("text", out.map)
        return out

    def report(self) -> Report:
        """Tokens, bytes, FLOPs and seconds so far; what comes later does not change it."""
        return Report(str(self.plan), self.forwards, self.flops, self.flops_dense, deepcopy(self.records))

    def provenance(self) -> dict[str, TokenMap | dict[int, TokenMap]]:
        """Of the last forward, by stage: one map composed over the layers, or, where layers act each on their own
        (caches, reductions around a sub-layer), a map a layer."""
        chained: dict[str, TokenMap | dict[int, TokenMap]] = {
            stage: reduce(TokenMap.then, maps) for stage, maps in self._chains.items()
        }
        return {**chained, **{stage: dict(maps) for stage, maps in self._parallel.items()}}


def _few(tallies: dict[str, Tally]) -> list[tuple[str, Tally]]:
    """The first so many, and the others together."""
    rows = list(tallies.items())
    if len(rows) <= MOST_ROWS:
        return rows
    rest = Tally()
    for _, tally in rows[MOST_ROWS - 1 :]:
        rest.add(tally.tried, tally.accepted)
    return [*rows[: MOST_ROWS - 1], (f"{rows[MOST_ROWS - 1][0]} to {rows[-1][0]}", rest)]


def _compile_anew(undo: ExitStack) -> None:
    """What ``torch.compile`` made of the model knows nothing of hooks that come later, nor that they are gone."""
    if "torch._dynamo" in sys.modules:  # else nothing was compiled
        torch.compiler.reset()
    undo.callback(lambda: torch.compiler.reset() if "torch._dynamo" in sys.modules else None)
