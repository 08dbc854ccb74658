"""ADED: draft the continuations that a tree search over a table of trigrams came by most."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from ..core.draft import NOTHING, ROOT, Draft
from ..core.errors import ThriftError
from ..core.method import method
from .chances import HOPELESS, Calibration, whole
from .protocols import Request
from .tree_search import search
from .trigrams import WINDOW, Trigrams, corpus_of


@method(
    "aded",
    stage="decode",
    paper="Adaptive Draft-Verification for Efficient Large Language Model Decoding",
    arxiv="2407.12021",
    status="partial",
)
class Aded:
    """Draft a tree of the continuations that a Monte-Carlo search over a table of trigrams came by most often.

    The table holds values of the successors of every two tokens: shares in a corpus, if there is one; each step adds
    0.04, up to 3, to all trigrams of the last 16 tokens. The search plays 150 continuations of three tokens from the
    last two; the 23 that most plays came by, each with its likeliest next token, are merged to a tree.

    Args:
        corpus: file of JSON lines, each a text or its list of token ids, to fill the table from: the likes of what the
            model is going to write. Without one the table knows only what was seen, in the prompts and outputs.
        rounds: continuations that the search plays.
        paths: continuations drafted, less one (the root is counted, as in the authors' code).
        nodes: guesses in the tree; the longest paths are left out until their tokens are no more.
        seed: of the search; the same text and table give the same draft.
        adaptive: give every guess its chance, from how often successors with such a share of the table's values were
            right of late, so that only what pays on this machine is verified. False always verifies the whole tree.
        prompt: let the table begin with the trigrams of the whole prompt; the authors' code looks at its end only.
        share: keep the table of a model from request to request, as the authors do: drafts get better, and hold tokens
            that other requests wrote. False begins every request with the corpus.

    Partial: the authors' code goes through hash maps in random order and draws from an unseeded generator, so there are
    no numbers of theirs to compare with; its order is replaced by that of the table. Its reward looks up the second
    token of each pair where the token that was added is meant (and said); here it is the latter. Sampling is exact
    here, theirs draws anew for each path and takes the longest match, which is not. Rows have at most 12 successors and
    the 100,000 pairs looked at last stay, where theirs have no bound.

    Raises:
        ThriftError: a parameter outside its range, a corpus that is not there or not as said.
    """

    corpus: str | None = None
    rounds: int = 150
    paths: int = 24
    nodes: int = 64
    seed: int = 0
    adaptive: bool = True
    prompt: bool = True
    share: bool = True

    def __post_init__(self) -> None:
        whole("aded", rounds=self.rounds, nodes=self.nodes)
        whole("aded", least=2, paths=self.paths)
        whole("aded", least=0, seed=self.seed)
        if self.corpus is not None and not Path(self.corpus).is_file():
            raise ThriftError(f"aded finds no corpus file {self.corpus}: write the path of a file of JSON lines")

    def start(self, tokens: Sequence[int], request: Request) -> AdedDrafter:
        """The drafter of a sequence that begins with the prompt ``tokens``."""
        path = self.corpus
        where = str(getattr(request.model.config, "_name_or_path", ""))

        def make() -> Trigrams:
            return Trigrams(corpus_of(path, Path(path).stat().st_mtime, where) if path else None)

        table = request.shared(("aded", path), make) if self.share else make()
        if self.prompt:
            table.look(tokens)
        return AdedDrafter(self, table, tokens)


class AdedDrafter:
    """One sequence, and the table that all share (a :class:`tokenthrift.decoding.protocols.Drafter`)."""

    def __init__(self, method: Aded, table: Trigrams, prompt: Sequence[int]) -> None:
        self.method, self.table = method, table
        self.calibration = Calibration()
        self.last = list(prompt[-WINDOW:])
        self._draws = random.Random(method.seed)

    def extend(self, tokens: Sequence[int]) -> None:
        """Look at the last tokens; each shows how far the table was right."""
        for token in tokens:
            row = self.table[tuple(self.last[-2:])]  # type: ignore[index]
            total = sum(row.values())
            for guess, value in row.items():
                self.calibration.note(value / total, guess == token)
            self.last.append(token)
        del self.last[:-WINDOW]
        self.table.look(self.last)

    def propose(self, limit: int) -> Draft:
        """The tree of the continuations that the search came by most."""
        if len(self.last) < 2 or limit < 1:
            return NOTHING
        a, b = self.last[-2:]
        paths = []
        for path, _ in search(self.table, (a, b), self._draws, self.method.rounds, self.method.paths)[1:]:
            row = self.table[(a, b, *path)[-2:]]  # type: ignore[index]
            paths.append((*path, max(row, key=row.__getitem__)) if row else path)
        return self._tree(_within(paths, self.method.nodes)).within(limit, set())

    def _tree(self, paths: Sequence[tuple[int, ...]]) -> Draft:
        tokens: list[int] = []
        parents: list[int] = []
        chances: list[float] = []
        nodes: dict[tuple[int, ...], int | None] = {(): ROOT}  # None where a path has no chance
        for path in paths:
            for end in range(1, len(path) + 1):
                way = path[:end]
                if way in nodes:
                    continue
                nodes[way] = None
                if (parent := nodes[way[:-1]]) is None:
                    break
                row = self.table[(*self.last[-2:], *way)[-3:-1]]  # type: ignore[index]
                chance = self.calibration(row[way[-1]] / sum(row.values()))
                chance *= 1.0 if parent == ROOT else chances[parent]
                if (self.method.adaptive and chance < HOPELESS) or len(tokens) == self.method.nodes:
                    break
                nodes[way] = len(tokens)
                tokens.append(way[-1])
                parents.append(parent)
                chances.append(chance)
        return Draft(tokens, parents, chances if self.method.adaptive else None, "trigrams")


def _within(paths: Sequence[tuple[int, ...]], nodes: int) -> list[tuple[int, ...]]:
    """The paths, without those of most distinct tokens, the less visited first, until they have so many together."""
    kept = list(dict.fromkeys(paths))
    sizes = [len(set(path)) for path in kept]
    out, total = set(), sum(sizes)
    for i in sorted(range(len(kept)), key=lambda i: (-sizes[i], -i)):
        if total <= nodes:
            break
        total -= sizes[i]
        out.add(i)
    return [path for i, path in enumerate(kept) if i not in out]
