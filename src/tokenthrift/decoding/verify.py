"""The verifier: which of the drafted tokens stand, and where generation stops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList


class Stopper:
    """Stopping criteria, asked after every committed token, as plain decoding asks them.

    Length and end-of-sequence criteria are answered from Python integers, without touching a tensor.
    """

    def __init__(self, criteria: StoppingCriteriaList, max_length: int) -> None:
        self.max_length = min([c.max_length for c in criteria if type(c) is MaxLengthCriteria] + [max_length])
        eos = [c.eos_token_id for c in criteria if type(c) is EosTokenCriteria]
        self.eos: set[int] = {int(t) for ids in eos for t in torch.as_tensor(ids).flatten().tolist()}
        self.pads = any(hasattr(c, "eos_token_id") for c in criteria)
        """Whether rows that are done get padding, which is when transformers pads them."""
        self._others = StoppingCriteriaList(c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria))

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
        done = [t in self.eos for t in tokens]
        if self._others:
            other: list[bool] = self._others(ids, scores).tolist()
            done = [a or b for a, b in zip(done, other, strict=True)]
        return done


class Verifier:
    """Exact verification of a chain by one rule: take the model's own token at every position, as plain decoding does.

    The draft is only compared with it. Greedy: the token is the argmax, and the output equals plain greedy decoding.
    Sampling: the token is drawn from ``p``, so draft token ``x`` is accepted with probability ``p(x)``, and the law of
    the output is that of plain sampling. Logits processors, the random generator and the stopping criteria are called
    once per committed token and in the same order as in plain decoding, with the committed tokens only: with the same
    seed even sampled tokens are the same, and processors with a state work.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        stopper: Stopper,
        *,
        sample: bool,
        pad: int | None,
        batch: int,
        keep_scores: bool = False,
        keep_logits: bool = False,
    ) -> None:
        self.stopper = stopper
        self.sample = sample
        self.processors = processors
        self.pad = pad if stopper.pads else None
        self.done = [False] * batch
        self.scores: tuple[Tensor, ...] | None = () if keep_scores else None
        self.logits: tuple[Tensor, ...] | None = () if keep_logits else None
        # Then the argmax of all positions can be taken, and brought to the host, at once.
        self._at_once = not (sample or len(processors) or stopper.reads_tensors or keep_scores or keep_logits)

    @property
    def finished(self) -> bool:
        """Whether every row is done."""
        return all(self.done)

    @property
    def idle(self) -> list[bool]:
        """Per row, whether it only gets padding from now on."""
        return [done and self.pad is not None for done in self.done]

    def __call__(self, text: Tensor, length: int, draft: list[list[int]], logits: Tensor) -> list[list[int]]:
        """Commit tokens up to the first that a row's draft missed, or that ends the generation.

        Args:
            text: ``(batch, more than length + drafted)`` int64; the first ``length`` columns are committed, the next
                ``drafted`` are the draft. The column after the accepted ones is overwritten with the token that is
                committed instead.
            length: committed tokens per row.
            draft: ``batch`` lists of equally many drafted tokens.
            logits: ``(batch, drafted + 1, vocabulary)``, at the last committed token and every drafted one.

        Returns:
            For every newly committed position, at least one and at most ``drafted + 1``, the token of each row.
        """
        drafted = len(draft[0])
        picks = logits.argmax(-1).tolist() if self._at_once else None
        committed: list[list[int]] = []
        for i in range(drafted + 1):
            if picks is not None:
                tokens = [row[i] for row in picks]
            else:
                tokens = self._pick(text[:, : length + i], logits[:, i])
            if self.pad is not None:
                tokens = [self.pad if idle else t for t, idle in zip(tokens, self.done, strict=True)]
            committed.append(tokens)
            agree = i < drafted and all(row[i] == t for row, t in zip(draft, tokens, strict=True))
            if not agree:
                text[:, length + i] = torch.tensor(tokens, device=text.device)
            now = self.stopper(tokens, text[:, : length + i + 1], length + i + 1, self.scores)
            self.done = [a or b for a, b in zip(self.done, now, strict=True)]
            if self.finished or not agree:
                break
        return committed

    def _pick(self, ids: Any, logits: Tensor) -> list[int]:
        """The model's token for each row after ``ids``: argmax, or a draw."""
        raw = logits.to(device=ids.device, dtype=torch.float32, copy=True)
        scores = self.processors(ids, raw)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (raw,)
        if self.sample:
            chosen = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            chosen = scores.argmax(-1)
        tokens: list[int] = chosen.tolist()
        return tokens
