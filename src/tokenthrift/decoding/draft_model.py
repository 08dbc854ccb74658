"""Speculative decoding with a draft model: it writes a few tokens ahead, one forward of the target checks them."""

from __future__ import annotations

import torch

from ..core.draft import ROOT
from ..core.method import method
from .from_model import FromModel
from .growing import Growth, Tree
from .rules import rule_of


@method(
    "draft_model",
    stage="decode",
    paper="Fast Inference from Transformers via Speculative Decoding; VocabTrim: Vocabulary Pruning for Efficient "
    "Speculative Decoding in LLMs",
    arxiv="2211.17192",
)
class DraftModel(FromModel):
    """Draft a chain with a small model: its likeliest tokens, or when sampling tokens drawn from its own law.

    Drawn tokens go through the request's logits processors, and are accepted with probability ``min(1, p/q)``
    (speculative sampling); the law of the output is the target's. **Lossy** only with ``rule="typical"``.

    Args:
        draft: guesses at most.
        rule: how drawn guesses are judged: "reject"; "sample", exact for any guesses, which accepts fewer; "typical",
            Medusa's rule, which takes what is likely enough and so changes the output. Greedy decoding has no need of
            any, and is always exact.

    The other parameters, and VocabTrim's ``trim``: see :class:`~tokenthrift.decoding.from_model.FromModel`.

    Raises:
        ThriftError: as there.
    """

    draft: int = 8
    rule: str = "reject"  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(draft=1)
        rule_of(self.rule)

    def grow(self, tree: Tree, limit: int) -> Growth:
        node = ROOT
        for _ in range(min(limit, self.draft)):
            [law] = yield [node]
            if not law.any():
                return
            token = int(torch.multinomial(law, 1) if tree.sample else law.argmax())
            [node] = tree.add(node, [token], law)
            if tree.chance(node) < tree.worth:
                return
