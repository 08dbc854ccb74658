"""GOOSE: draft a deep spine copied from the text, with branches of the model's own likely tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from ..core.draft import NOTHING, ROOT, Draft
from ..core.method import method
from .chances import Trust, whole
from .protocols import Request
from .spine import Copies, Successors
from .spine_tree import FAR, grow


@method(
    "goose",
    stage="decode",
    paper="Goose: Anisotropic Speculation Trees for Training-Free Speculative Decoding",
    arxiv="2604.02047",
)
class Goose:
    """Draft a tree from two sources: a deep spine copied from the text, and wide branches of likely successors.

    The spine is what followed the last 5, 4 or 3 tokens where they first occurred. The surer it is (all occurrences
    agree, or the copy is long; copies were accepted of late), the more of the nodes it gets. The rest are branches at
    the root and along the spine, fewer further down: the successors of a pair of tokens, else of a token, that the
    model last thought likely (Token Recycling with pairs). Branches go on breadth-first.

    Args:
        nodes: nodes of the tree, the last committed token included; up to 100 where the spine is sure.
        depth: branches do not grow below it; those at a deep node of the spine have one level.
        k: successors kept.
        adaptive: give every guess its chance, so that only what pays on this machine is verified: of the spine, the
            share of right copies by length of match and agreement; of branches, that of right successors by score.
            False always verifies the whole tree, as the authors do.
        share: keep the successors of a model from request to request: drafts get better, and hold tokens that other
            requests wrote. False begins every request with none, as the authors do.

    Different from the authors' code: the table does not learn from the prompt's logits, of which ``generate`` computes
    only the last (their ``use_prefill_harvest=False``); the pair before the last committed token is learned in every
    step, theirs leaves it out where a tree was verified; a spine that had no branches counts as well for how well
    copies do; the 50,000 latest pairs are kept, theirs all.

    Raises:
        ThriftError: a parameter outside its range.
    """

    nodes: int = 60
    depth: int = 6
    k: int = 10
    adaptive: bool = True
    share: bool = True

    def __post_init__(self) -> None:
        whole("goose", least=2, nodes=self.nodes)
        whole("goose", depth=self.depth, k=self.k)

    def start(self, tokens: Sequence[int], request: Request) -> GooseDrafter:
        """The drafter of a sequence that begins with the prompt ``tokens``."""
        make = partial(Successors, self.k)
        return GooseDrafter(self, request.shared(("goose", self.k), make) if self.share else make(), tokens)


class GooseDrafter:
    """One sequence, and the successors that all share (a :class:`tokenthrift.decoding.protocols.Drafter`)."""

    def __init__(self, method: Goose, successors: Successors, prompt: Sequence[int]) -> None:
        self.method, self.successors = method, successors
        self.copies = Copies()
        self.accepted = 0.5  # share of the spine, of late
        self._trust = Trust(12), Trust(12)  # where occurrences differ, or there is one; where they agree
        self._draft = NOTHING
        for token in prompt:
            self.copies.append(token)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add committed tokens; each shows whether it would have been copied."""
        draft, node, right = self._draft, ROOT, 0
        for token in tokens:
            node = draft.child(node, token) if node is not None else None  # type: ignore[assignment]
            right += node is not None and draft.source(node) == "lookup"
            n, at, agreed = self.copies.find(self.copies.tokens[-5:])
            if n:
                self._trust[agreed].note(n, self.copies.tokens[at] == token)
            self.copies.append(token)
        spine = sum(draft.source(i) == "lookup" for i in range(len(draft)))
        if spine:
            self.accepted += 0.3 * (right / spine - self.accepted)

    def observe(self, draft: Draft, logits: Tensor) -> None:
        """Recycle: every token that was fed gets the likeliest successors that the model saw, accepted or not."""
        self._draft, text = draft, self.copies.tokens
        if not text:
            return
        fed = [text[-1], *draft.tokens]
        before: list[int | None] = [text[-2] if len(text) > 1 else None, *(fed[parent + 1] for parent in draft.parents)]
        node = ROOT
        while node is not None:  # along what the model itself says, before the table knows of it
            likeliest = int(logits[node + 1].argmax())
            for token, score in self.successors(before[node + 1], fed[node + 1]):
                self.successors.calibration.note(score, token == likeliest)
            node = draft.child(node, likeliest)  # type: ignore[assignment]
        self.successors.update(before, fed, logits)

    def propose(self, limit: int) -> Draft:
        """The spine tree; a plain copy where no successors are known."""
        text = self.copies.tokens
        if not text:
            return NOTHING
        last = (text[-2] if len(text) > 1 else None, text[-1])
        chain, confidence = self.copies.chain(FAR)
        if self.successors(*last):
            tokens, parents, scores, spine = grow(
                self.successors, last, chain, confidence, self.accepted, self.method.nodes, self.method.depth
            )
        else:
            tokens = chain[: self.copies.longest]
            parents, scores, spine = list(range(ROOT, len(tokens) - 1)), [1.0] * len(tokens), len(tokens)
        sources = ["lookup"] * spine + ["recycling"] * (len(tokens) - spine)
        chances = self._chances(parents, scores, spine) if self.method.adaptive else None
        return Draft(tokens, parents, chances, sources).within(limit, set())

    def _chances(self, parents: Sequence[int], scores: Sequence[float], spine: int) -> list[float]:
        """Along the spine by trust; a branch beside the spine is for when the spine is wrong."""
        n, _, agreed = self.copies.find(self.copies.tokens[-5:])
        along = self._trust[agreed].chances(n, spine, least=0.0) if n else []
        chances = list(along)
        for node in range(spine, len(parents)):
            parent = parents[node]
            above = 1.0 if parent == ROOT else chances[parent]
            beside = along[parent + 1] if parent + 1 < len(along) and parent < spine else 0.0
            chances.append((above - beside) * self.successors.calibration(scores[node]))
        return chances
