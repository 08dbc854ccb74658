"""Token Recycling: draft a tree from what the model thought likely after these tokens before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ..core.draft import ROOT, Draft
from ..core.errors import ThriftError
from ..core.method import method
from .chances import HOPELESS
from .protocols import Request
from .static_trees import best_tree, levels_of

TEMPLATE = ("8", "84321111", "832111112100100101100", "5211100010010000001001100", "311001000010100", "20010000")
"""The paper's static tree of 80 nodes: level by level, how many children each node has, the root first. The children of
a node are the likeliest successors of its token."""
_RATE = 1 / 32


@method(
    "token_recycling",
    stage="decode",
    paper="Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling",
    arxiv="2408.08696",
)
class TokenRecycling:
    """Draft a tree from a matrix of the likeliest successors of every token, as the model last saw them.

    The matrix ``(vocabulary, k)`` holds, for every token that was fed, the k likeliest tokens that the model predicted
    after it, also where the guess that fed it was rejected. A draft begins at the last token and goes down a static
    tree, in which the children of a node are the first so many successors of its token.

    Args:
        k: successors kept a token; at most 8 appear in the tree.
        nodes: guesses in the tree at most, the first of the paper's 80 in breadth-first order.
        adaptive: give every guess its chance, from how often the successors of each rank were right of late, so that
            only what pays on this machine is verified. False always verifies the whole tree.
        prompt: let the matrix begin with what followed each token in the prompt. The authors' code does not.
        share: keep the matrix of a model from request to request, as the paper does: drafts get better, and hold tokens
            that other requests wrote. False begins every request with an empty one.
        tree: "paper" is its static tree; "sequoia" the best tree of ``nodes`` guesses for how often successors of each
            rank were right in earlier requests (:mod:`tokenthrift.decoding.static_trees`).

    Tokens without a row, at first all, have no children (the authors' code guesses token 0).

    Raises:
        ThriftError: a parameter outside its range.
    """

    k: int = 8
    nodes: int = 80
    adaptive: bool = True
    prompt: bool = True
    share: bool = True
    tree: str = "paper"

    def __post_init__(self) -> None:
        if self.k < 1 or self.nodes < 1:
            raise ThriftError("token_recycling needs k and nodes of at least 1")
        if self.tree not in ("paper", "sequoia"):
            raise ThriftError(f"token_recycling knows tree='paper' and 'sequoia', not {self.tree!r}")

    def start(self, tokens: Sequence[int], request: Request) -> RecyclingDrafter:
        """The drafter of a sequence that begins with the prompt ``tokens``."""
        make = partial(Successors, int(request.model.config.get_text_config().vocab_size), self.k)
        matrix = request.shared(("token_recycling", self.k), make) if self.share else make()
        if self.prompt:
            matrix.learn(tokens)
        return RecyclingDrafter(self, matrix, tokens)


class Successors:
    """The matrix, and how far its ranks can be trusted.

    Attributes:
        table: ``(vocabulary, k)`` int32, the likeliest successor first; -1 where nothing is known.
        trust: of each rank, the share of tokens that stood there.
    """

    def __init__(self, vocabulary: int, k: int) -> None:
        self.table = torch.full((vocabulary, k), -1, dtype=torch.int32)
        self.trust = [0.4 / (rank + 1) ** 1.5 for rank in range(k)]

    def __getitem__(self, tokens: Sequence[int]) -> list[list[int]]:
        rows: list[list[int]] = self.table[torch.tensor(tokens)].tolist()
        return rows

    def update(self, tokens: Sequence[int], successors: Tensor) -> None:
        """Set rows; of a token that comes several times the last row stays."""
        last = {token: i for i, token in enumerate(tokens)}
        self.table[torch.tensor(list(last))] = successors[list(last.values())].to(self.table)

    def learn(self, tokens: Sequence[int]) -> None:
        """Put what follows each token in a text first among its successors."""
        for token, following in pairwise(tokens):
            row = self.table[token].tolist()
            if following in row:
                row.remove(following)
            self.table[token] = torch.tensor([following, *row][: len(self.trust)])

    def judge(self, token: int, following: int) -> None:
        """Note at which rank, if any, the token that followed stood; of tokens without a row nothing was guessed."""
        [row] = self[[token]]
        for rank, guess in enumerate(row):
            if guess >= 0:
                self.trust[rank] += _RATE * ((guess == following) - self.trust[rank])


class RecyclingDrafter:
    """One sequence, and the matrix that all share (a :class:`tokenthrift.decoding.protocols.Drafter`)."""

    def __init__(self, method: TokenRecycling, matrix: Successors, prompt: Sequence[int]) -> None:
        self.method, self.matrix = method, matrix
        self.last = prompt[-1] if len(prompt) else None
        self.template: Sequence[Sequence[int]] = [[int(width) for width in level] for level in TEMPLATE]
        if method.tree == "sequoia":
            rates = [max(round(share, 2), 0.01) for share in matrix.trust]
            self.template = levels_of(best_tree(rates, {method.nodes + 1: 1.0}, depth=len(TEMPLATE) + 1))

    def extend(self, tokens: Sequence[int]) -> None:
        """Go on from the last of these tokens."""
        self.last = tokens[-1]

    def observe(self, draft: Draft, logits: Tensor) -> None:
        """Recycle: every token that was fed gets the likeliest successors that the model saw, accepted or not."""
        if self.last is None:
            return
        fed = [self.last, *draft.tokens]
        successors = logits.topk(min(self.method.k, logits.shape[-1])).indices.cpu()
        likeliest, node = successors[:, 0].tolist(), ROOT
        while node is not None:  # along what the model itself says, before the matrix knows of it
            self.matrix.judge(fed[node + 1], likeliest[node + 1])
            node = draft.child(node, likeliest[node + 1])  # type: ignore[assignment]
        self.matrix.update(fed, successors)

    def propose(self, limit: int) -> Draft:
        """The tree of the template, less what has no successor or no chance."""
        if self.last is None:
            return Draft()
        tokens: list[int] = []
        parents: list[int] = []
        chances: list[float] = []
        level: list[int | None] = [ROOT]  # nodes of the draft, None where one is missing
        slots = 0
        for widths in self.template[:limit]:
            known = [node for node in level if node is not None]
            rows = iter(self.matrix[[self.last if node == ROOT else tokens[node] for node in known]] if known else [])
            following: list[int | None] = []
            for node, width in zip(level, widths, strict=True):
                row = next(rows) if node is not None else []
                for rank in range(width):
                    guess = row[rank] if rank < len(row) else -1
                    above = 1.0 if node in (ROOT, None) else chances[node]  # type: ignore[index]
                    chance = above * self.matrix.trust[rank] if rank < len(row) else 0.0
                    slots += 1
                    if guess < 0 or slots > self.method.nodes or (self.method.adaptive and chance < HOPELESS):
                        following.append(None)
                        continue
                    following.append(len(tokens))
                    tokens.append(guess)
                    parents.append(node)  # type: ignore[arg-type]
                    chances.append(chance)
            level = following
        return Draft(tokens, parents, chances if self.method.adaptive else None, "recycling")
