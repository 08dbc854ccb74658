"""The verifier: which of the drafted tokens stand, and where generation stops."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from ..core.draft import ROOT, Draft
from .rules import LOSSY, RULES, Rule, sample


def _those_there(*names: str) -> tuple[type, ...]:
    """Of these logits processors the ones that this version of transformers has."""
    return tuple(getattr(logits_process, name) for name in names if hasattr(logits_process, name))


BLIND = _those_there(
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
    "EpsilonLogitsWarper", "EtaLogitsWarper", "TopHLogitsWarper", "SuppressTokensLogitsProcessor",
    "InfNanRemoveLogitsProcessor", "LogitNormalization",
)  # fmt: skip
"""Logits processors that read no tokens, so that all nodes of a tree can go through them at once."""
BY_ROW = BLIND + _those_there(
    "RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor", "NoBadWordsLogitsProcessor",
    "SequenceBiasLogitsProcessor", "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor", "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor",
    "ExponentialDecayLengthPenalty",
)  # fmt: skip
"""Logits processors that do to a row of a batch what they would do to it alone, and keep no state."""


class Stopper:
    """Stopping criteria, asked after every committed token, as plain decoding asks them.

    Length and end-of-sequence criteria are answered from Python integers, without touching a tensor.
    """

    def __init__(self, criteria: StoppingCriteriaList, max_length: int) -> None:
        self.max_length = min([c.max_length for c in criteria if type(c) is MaxLengthCriteria] + [max_length])
        eos = [c.eos_token_id for c in criteria if type(c) is EosTokenCriteria]
        self.ends: set[int] = {int(t) for ids in eos for t in torch.as_tensor(ids).flatten().tolist()}
        self.pads = any(hasattr(c, "eos_token_id") for c in criteria)
        """Whether rows that are done get padding, which is when transformers pads them."""
        self._others = StoppingCriteriaList(c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria))

    @property
    def by_row(self) -> bool:
        """Whether rows may be asked about one by one, at lengths of their own."""
        return all(type(c) in (StopStringCriteria, MaxTimeCriteria) for c in self._others)

    @property
    def reads_tensors(self) -> bool:
        """Whether a criterion needs the token tensor (stop strings, the user's own)."""
        return bool(self._others)

    def __call__(self, tokens: Sequence[int], ids: Tensor | None, length: int, scores: Any) -> list[bool]:
        """Per row, whether generation stops now that ``tokens`` (one a row) made the text ``length`` tokens long.

        ``ids`` ``(batch, length)`` is read only if :attr:`reads_tensors`.
        """
        if length >= self.max_length:
            return [True] * len(tokens)
        done = [t in self.ends for t in tokens]
        if self._others:
            other: list[bool] = self._others(ids, scores).tolist()
            done = [a or b for a, b in zip(done, other, strict=True)]
        return done


def of_row(processors: LogitsProcessorList, row: int) -> LogitsProcessorList:
    """The processors for a row alone: those that hold something for each row of the batch get theirs."""
    mine = LogitsProcessorList()
    for processor in processors:
        lengths = getattr(processor, "prompt_ignore_length", None)
        if isinstance(lengths, Tensor) and len(lengths) > 1:
            processor = copy(processor)
            processor.prompt_ignore_length = lengths[row : row + 1]
        mine.append(processor)
    return mine


class Text:
    """The tokens of a batch, rows of different lengths in one buffer.

    Attributes:
        ids: ``(batch, columns)`` int64, of each row the first :attr:`lengths` columns.
        lengths: prompt with its padding, and committed tokens.
    """

    def __init__(self, input_ids: Tensor, room: int) -> None:
        batch, length = input_ids.shape
        self.ids = torch.cat([input_ids, input_ids.new_zeros(batch, room)], dim=1)
        self.lengths = [length] * batch

    def append(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Add a token to each of these rows."""
        longest = max(self.lengths[row] for row in rows)
        if longest == self.ids.shape[1]:
            self.ids = torch.nn.functional.pad(self.ids, (0, longest + 1))
        for row, token in zip(rows, tokens, strict=True):
            self.ids[row, self.lengths[row]] = token
            self.lengths[row] += 1

    def all(self, pad: int) -> Tensor:
        """``(batch, longest)``, shorter rows padded on the right."""
        ids = self.ids[:, : max(self.lengths)].clone()
        for row, length in enumerate(self.lengths):
            ids[row, length:] = pad
        return ids

    def of(self, rows: Sequence[int]) -> Tensor:
        """``(rows, length)``: rows of one length; a view."""
        end = self.lengths[rows[0]]
        return self.ids[:, :end] if len(rows) == len(self.lengths) else self.ids[rows[0] : rows[0] + 1, :end]


@dataclass
class Verdict:
    """Of one row: the tokens committed, and the nodes of the draft that stand. The last token may be no node.

    The last token is not in the cache yet, also where it is a node: see :attr:`cached`.
    """

    tokens: list[int] = field(default_factory=list)
    path: list[int] = field(default_factory=list)

    @property
    def cached(self) -> list[int]:
        """The nodes whose keys and values stay: of all tokens but the last, which the next forward is fed."""
        return self.path[: max(len(self.tokens) - 1, 0)]


class Verifier:
    """Walks down a draft with the model's own choice at every node, as plain decoding makes it.

    Greedy: the choice is the argmax, and the output equals plain greedy decoding. Sampling: the choice follows the
    model's law by a :mod:`rule <tokenthrift.decoding.rules>`. A lossy rule decides in both. Logits processors, the
    random generator and the stopping criteria are called once per committed token and in the same order as in plain
    decoding, with committed tokens only: with the default rule and the same seed even sampled tokens are the same, and
    processors with a state work.

    Rows of a batch go their own ways, unless ``joint``: then they move one token at a time together, as far as all
    accept, and processors and criteria get the batch, as in plain decoding.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        stopper: Stopper,
        *,
        sample: bool,
        pad: int | None,
        batch: int,
        joint: bool = True,
        rule: Rule = sample,
        keep_scores: bool = False,
        keep_logits: bool = False,
    ) -> None:
        self.stopper, self.processors, self.rule = stopper, processors, rule
        self.joint = joint
        self.pad = pad if stopper.pads else None
        self.done = [False] * batch
        self.scores: tuple[Tensor, ...] | None = () if keep_scores else None
        self.logits: tuple[Tensor, ...] | None = () if keep_logits else None
        # Then the argmax of all nodes can be taken, and brought to the host, at once.
        self._ruled = sample or rule in [RULES[name] for name in LOSSY]
        self._at_once = not (self._ruled or len(processors) or stopper.reads_tensors or keep_scores or keep_logits)

    @property
    def finished(self) -> bool:
        """Whether every row is done."""
        return all(self.done)

    @property
    def idle(self) -> list[bool]:
        """Per row, whether it only gets padding from now on."""
        return [done and (self.pad is not None or not self.joint) for done in self.done]

    def __call__(self, text: Text, drafts: Sequence[Draft | None], logits: Sequence[Tensor]) -> list[Verdict]:
        """Commit to ``text``, down to the first node that the model did not choose, or that ends the generation.

        Args:
            drafts: row by row; None for idle rows.
            logits: row by row ``(nodes + 1, vocabulary)``, at the last committed token and every node.

        Returns:
            Row by row at least one token; none for idle rows that do not move with the others.
        """
        verdicts = [Verdict() for _ in drafts]
        picks = None
        if self._at_once:
            widths = [len(rows) for rows in logits]
            picks = [row.tolist() for row in torch.cat(list(logits)).argmax(-1).cpu().split(widths)]
        groups = [list(range(len(drafts)))] if self.joint else [[b] for b, d in enumerate(drafts) if d is not None]
        for rows in groups:
            self._walk(rows, text, drafts, logits, picks, verdicts)
        return verdicts

    def _walk(
        self,
        rows: list[int],
        text: Text,
        drafts: Sequence[Draft | None],
        logits: Sequence[Tensor],
        picks: list[list[int]] | None,
        verdicts: list[Verdict],
    ) -> None:
        nodes, pad = [ROOT] * len(rows), self.pad or 0
        while True:
            idle = [self.idle[row] for row in rows]
            if picks is not None:
                tokens = [
                    pad if still else picks[row][node + 1] for row, node, still in zip(rows, nodes, idle, strict=True)
                ]
            else:
                tokens = self._choose(rows, text, drafts, nodes, logits)
                tokens = [pad if still else t for t, still in zip(tokens, idle, strict=True)]
            text.append(rows, tokens)
            ids = text.of(rows) if self.stopper.reads_tensors else None
            now = self.stopper(tokens, ids, text.lengths[rows[0]], self.scores)
            agree = True
            for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
                verdicts[row].tokens.append(token)
                self.done[row] = self.done[row] or now[i]
                draft = drafts[row]
                if draft is None or idle[i]:
                    verdicts[row].path.append(nodes[i] + 1)  # goes along with the others
                    nodes[i] += 1
                    continue
                child = draft.child(nodes[i], token)
                agree = agree and child is not None
                if child is not None:
                    nodes[i] = child
                    verdicts[row].path.append(child)
            if not agree or all(self.done[row] for row in rows):
                break

    def _choose(
        self,
        rows: list[int],
        text: Text,
        drafts: Sequence[Draft | None],
        nodes: list[int],
        logits: Sequence[Tensor],
    ) -> list[int]:
        """The model's token for each row: argmax, or by the rule. Idle rows get any."""
        ids = text.of(rows)
        some = next(logits[row][0] for row in rows if len(logits[row]))
        at = [
            logits[row][node + 1] if node + 1 < len(logits[row]) else some
            for row, node in zip(rows, nodes, strict=True)
        ]
        raw = torch.stack(at).to(device=ids.device, dtype=torch.float32, copy=True)
        processors = self.processors if len(rows) == len(self.done) else of_row(self.processors, rows[0])
        scores: Tensor = processors(ids, raw)  # type: ignore[arg-type]
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (raw,)
        if not self._ruled:
            return scores.argmax(-1).tolist()  # type: ignore[no-any-return]
        laws = scores.softmax(-1)
        if self.rule is sample:
            return torch.multinomial(laws, num_samples=1).squeeze(1).tolist()  # type: ignore[no-any-return]
        tokens = []
        for row, node, law in zip(rows, nodes, laws, strict=True):
            draft = drafts[row] or Draft()
            tokens.append(self.rule(law, list(draft.children.get(node, ())), draft.drawn.get(node)))
        return tokens
