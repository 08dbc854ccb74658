"""What methods that draft with a small model share: the model, its vocabulary, and the loop that grows their trees."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from os import fspath
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.draft import NOTHING, ROOT, Draft
from ..core.errors import ThriftError
from ..models.decoder import context_length
from ..models.drafts import Given, as_draft, load_draft
from .chances import whole
from .growing import Growth, Tree, Trust
from .model_text import ModelText
from .protocols import Request
from .verify import BLIND, BY_ROW, of_row
from .vocab_trim import TokenCounts
from .vocabularies import TrimmedHead, Vocabulary, match

_RATE = 1 / 16  # how fast measured times follow


@dataclass(frozen=True, kw_only=True)
class FromModel:
    """A method whose drafts come from a draft model; :meth:`grow` is its algorithm.

    Args:
        model: the draft model: a pack, folder or hub id, or a loaded model.
        tokenizer: of a model that was passed in, if it was not loaded from a folder: to compare vocabularies.
        vocabulary: "auto" maps tokens by their strings where the tokenizers differ; "same" takes equal numbers for
            equal tokens, for models that differ in padding.
        trim: a file of token counts that ``tokenthrift calibrate vocabulary`` wrote (VocabTrim, arXiv 2506.22694): only
            frequent tokens are drafted, and the draft model's output layer computes no others.
        trim_size: how many of them; None keeps all that were seen.
        adaptive: draft as far as it pays by measured times and acceptance, and rest where it does not. False always
            drafts, and verifies, in full.

    Raises:
        ThriftError: a parameter outside its range; when generating: a model that cannot be loaded or cannot draft, a
            vocabulary with too little in common, a file that holds no counts.
    """

    model: Any
    tokenizer: Any = None
    vocabulary: str = "auto"
    trim: str | None = None
    trim_size: int | None = None
    adaptive: bool = True

    rule: ClassVar[str] = "reject"

    def __post_init__(self) -> None:
        name = self.info.name  # type: ignore[attr-defined]
        object.__setattr__(self, "model", as_draft(name, "model", self.model))
        if self.vocabulary not in ("auto", "same"):
            raise ThriftError(f"{name} knows vocabulary='auto' and 'same', not {self.vocabulary!r}")
        if self.trim_size is not None and (self.trim is None or self.trim_size < 1):
            raise ThriftError(f"{name} needs trim_size of at least 1, and a file of token counts as trim")

    def check(self, **least: int) -> None:
        """Raise ThriftError for parameters that are not whole numbers of at least so much."""
        for name, bound in least.items():
            whole(self.info.name, bound, **{name: getattr(self, name)})  # type: ignore[attr-defined]

    def grow(self, tree: Tree, limit: int) -> Growth:
        """Grow a tree at most ``limit`` deep; see :mod:`tokenthrift.decoding.growing`."""
        raise NotImplementedError

    def start_batch(self, prompts: Sequence[Sequence[int]], request: Request) -> ModelDrafters:
        """The drafters of rows that begin with these prompts."""
        return ModelDrafters(self, prompts, request)


class ModelDrafters:
    """A draft model, run over all rows of a batch at once (:class:`tokenthrift.decoding.protocols.Drafters`)."""

    def __init__(self, method: FromModel, prompts: Sequence[Sequence[int]], request: Request) -> None:
        self.method, self.request = method, request
        if isinstance(method.model, Given):
            self.model, tokenizer = method.model.model, method.tokenizer
        else:
            target = request.model
            self.model, tokenizer = load_draft(fspath(method.model), str(target.device), target.dtype)
            tokenizer = method.tokenizer or tokenizer
        if not getattr(self.model, "can_generate", lambda: False)() or self.model.config.is_encoder_decoder:
            raise ThriftError(f"{type(self.model).__name__} cannot draft: choose a causal language model")
        same = method.vocabulary == "same"
        name: str = method.info.name  # type: ignore[attr-defined]
        self.vocabulary: Vocabulary = match(
            request.model, self.model, request.tokenizer, tokenizer, same=same, method=name
        )
        self.head: Any = nullcontext()
        if method.trim is not None:
            self.head = TrimmedHead(self.model, self._trimmed(method.trim))
        self.room = context_length(self.model) or 10**9
        self.texts = [list(prompt) for prompt in prompts]
        self.read: ModelText | None = None
        self.trees: dict[int, Tree] = {}
        self.trust = Trust()
        self._step = _Pace()
        self._processors = [
            [p for p in of_row(request.processors, row) if type(p) in BY_ROW] for row in range(len(prompts))
        ]
        self._blind = all(type(p) in BLIND for row in self._processors for p in row)

    def _trimmed(self, path: str) -> list[int]:
        counts = TokenCounts.load(path)
        if counts.vocabulary != self.vocabulary.size:
            raise ThriftError(
                f"{path} counts {counts.vocabulary:,} tokens, the target has {self.vocabulary.size:,}: count the "
                "target's own with 'tokenthrift calibrate vocabulary'"
            )
        kept = self.vocabulary.keep(counts.top(self.method.trim_size) | self.request.ends)
        if not kept:
            raise ThriftError(f"{path} counts none of the draft model's tokens: count more text")
        return kept

    def extend(self, tokens: Sequence[Sequence[int]]) -> None:
        """Rows go on with these tokens."""
        paths: list[list[int]] = []
        for row, new in enumerate(tokens):
            self.texts[row] += new
            tree, node = self.trees.get(row), ROOT
            paths.append([])
            if tree is None:
                continue
            tree.judge(new)
            for token in new:
                child = tree.child(node, token)
                if child is None:
                    break
                paths[row].append(child)
                node = child
        self.trees = {}
        self._step.committed(sum(map(len, tokens)))
        if self.read is not None:
            self.read.extend([self.vocabulary.encode(new) for new in tokens], paths)

    def observe(self, drafts: Sequence[Draft | None], logits: Sequence[Tensor]) -> None:
        """Nothing is learnt from logits."""

    def propose(self, limits: Sequence[int | None]) -> list[Draft]:
        """Grow a tree on every row, all rows in the same forwards of the draft model."""
        began, forwards = perf_counter(), 0
        rooms = [self.room - len(text) for text in self.texts]
        depths = {row: min(limit, rooms[row]) for row, limit in enumerate(limits) if limit is not None}
        depths = {row: depth for row, depth in depths.items() if depth > 0 and self.texts[row]}
        if not depths:
            return [NOTHING] * len(limits)
        if self.read is None:
            texts = [text if room > 0 else [] for text, room in zip(self.texts, rooms, strict=True)]
            self.read = ModelText(self.model, [self.vocabulary.encode(text) or [0] for text in texts])
            began, self._step = perf_counter(), _Pace()  # reading the prompt is not part of any step
        worth = self._step.worth(len(depths)) if self.method.adaptive else 0.0
        self.trees = {row: Tree(self.request.sample, self.trust, worth) for row in depths}
        growths = {row: self.method.grow(self.trees[row], depth) for row, depth in depths.items()}
        wanted = {row: next(growth) for row, growth in growths.items()}
        while wanted:
            laws = self._laws(wanted)
            forwards += 1
            following = {}
            for row, law in zip(wanted, laws, strict=True):
                with suppress(StopIteration):
                    following[row] = growths[row].send(law)
            wanted = following
        self._step.drafted((perf_counter() - began) / forwards)
        source, chances = self.method.info.name, self.method.adaptive  # type: ignore[attr-defined]
        return [
            self.trees[row].draft(source, chances=chances) if row in self.trees else NOTHING
            for row in range(len(limits))
        ]

    def _laws(self, wanted: dict[int, list[int]]) -> list[Tensor]:
        """By row, ``(nodes, vocabulary)``: what follows the nodes, shaped as the target's law is; rows of zeros where
        nothing can."""
        assert self.read is not None
        tokens = {
            row: self.vocabulary.encode([0 if node == ROOT else self.trees[row].tokens[node] for node in nodes])
            for row, nodes in wanted.items()
        }
        with self.head:
            logits = self.read.ask(wanted, tokens, self.trees)
        scores = self.vocabulary.spread(torch.cat(logits)).float()
        if self._blind:
            none = torch.zeros(len(scores), 1, dtype=torch.long, device=scores.device)
            for processor in self._processors[0]:
                scores = processor(none, scores)
        else:
            nodes = [(row, node) for row, asked in wanted.items() for node in asked]
            scores = torch.stack([self._shape(row, node, s) for (row, node), s in zip(nodes, scores, strict=True)])
        laws = scores.softmax(-1).nan_to_num_(0.0)
        return list(laws.split([len(nodes) for nodes in wanted.values()]))

    def _shape(self, row: int, node: int, scores: Tensor) -> Tensor:
        ids = torch.tensor([[*self.texts[row], *self.trees[row].path(node)]], device=scores.device)
        scores = scores[None]
        for processor in self._processors[row]:
            scores = processor(ids, scores)
        return scores[0]


class _Pace:
    """Measured times, and from them how likely a guess must be to be worth a forward of the draft model.

    Tokens come at some rate. A forward of the draft model takes time in which that rate would bring other tokens, so it
    has to bring as many: the rate is then the best there is.
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._tokens = self._seconds = 0.0
        self._forward: float | None = None

    def committed(self, tokens: int) -> None:
        """A step ended, with so many tokens over all rows."""
        now = perf_counter()
        if self._last is not None:
            self._tokens += _RATE * (tokens - self._tokens)
            self._seconds += _RATE * (now - self._last - self._seconds)
        self._last = now

    def drafted(self, seconds: float) -> None:
        """A forward of the draft model took so long."""
        self._forward = seconds if self._forward is None else self._forward + _RATE * (seconds - self._forward)

    def worth(self, rows: int) -> float:
        """The chance from which on a guess, in each of so many rows, is worth going on from."""
        if self._forward is None or not self._seconds:
            return 0.0
        return self._tokens / self._seconds * self._forward / rows
