"""Trees from draft models, on tables instead of models: their shapes, and the law of what is committed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from tokenthrift.core.draft import ROOT, Draft
from tokenthrift.core.errors import ThriftError
from tokenthrift.decoding.draft_model import DraftModel
from tokenthrift.decoding.dyspec import DySpec
from tokenthrift.decoding.growing import Tree, Trust, pick
from tokenthrift.decoding.planner import Planner
from tokenthrift.decoding.rsd import RSD
from tokenthrift.decoding.rules import rule_of
from tokenthrift.decoding.sequoia import Sequoia
from tokenthrift.decoding.spectr import SpecTr
from tokenthrift.decoding.static_trees import best_tree, levels_of
from tokenthrift.decoding.verify import Stopper, Text, Verifier

GOLDEN = Path(__file__).parents[1] / "golden" / "decoding"
SIZE, START = 4, 1
torch.manual_seed(5)
TARGET, DRAFT = (torch.randn(2, SIZE, SIZE) * 1.2).softmax(-1)  # the law of what follows each token
METHODS = {
    "chain": DraftModel(model="toy", draft=3),
    "rsd_c": RSD(model="toy", branching=[2, 2, 1]),
    "rsd_s": RSD(model="toy", width=3, depth=3),
    "spectr": SpecTr(model="toy", drafts=3, depth=3),
    "dyspec": DySpec(model="toy", nodes=6, layered=False),
    "dyspec_layered": DySpec(model="toy", nodes=8),
    "sequoia": Sequoia(model="toy", nodes=7, depth=3, rates=[0.5, 0.2, 0.1]),
}


def grown(method, *, sample, start=START, table=DRAFT, limit=9, worth=0.0) -> Tree:
    """A tree of ``method``, with a table for a draft model."""
    tree = Tree(sample, worth=worth)
    growth = method.grow(tree, limit)
    asked, seen = next(growth), set()
    while True:
        assert not seen & set(asked)
        seen |= set(asked)
        try:
            asked = growth.send(torch.stack([table[start if node == ROOT else tree.tokens[node]] for node in asked]))
        except StopIteration:
            return tree


def committed(method, rule, length: int) -> tuple[int, ...]:
    """So many tokens by speculative decoding, target and draft model being tables."""
    text, end = [START], length + 1
    while len(text) < end:
        limit = end - len(text) - 1
        draft = Draft()
        if limit:
            draft = grown(method, sample=True, start=text[-1], limit=limit).draft("toy", chances=False)
        logits = TARGET[torch.tensor([text[-1], *draft.tokens])].log()
        verifier = Verifier(
            LogitsProcessorList(), Stopper(StoppingCriteriaList(), end), sample=True, pad=None, batch=1, rule=rule
        )
        [verdict] = verifier(Text(torch.tensor([text]), 8), [draft], [logits])
        text += verdict.tokens
    return tuple(text[1:])


def chi_square(method, rule, draws=2000) -> tuple[float, float]:
    """Of three tokens, 64 chains: the statistic, and its upper 0.001 quantile (Wilson and Hilferty).

    Cells expected fewer than 5 times are one. A law that is off by d in total variation has a noncentrality of at
    least 4 d^2 n: in 2,000 draws, on 26 degrees of freedom, d = 0.085 gives 58, which is seen with a power of 0.95.
    """
    torch.manual_seed(0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(draws):
        chain = committed(method, rule, 3)
        counts[chain] = counts.get(chain, 0) + 1
    cells: list[tuple[float, float]] = []
    rare = [0.0, 0.0]
    for chain in np.ndindex(SIZE, SIZE, SIZE):
        p = math.prod(float(TARGET[a][b]) for a, b in zip((START, *chain), chain, strict=False)) * draws
        if p < 5:
            rare = [rare[0] + counts.get(chain, 0), rare[1] + p]
        else:
            cells.append((counts.get(chain, 0), p))
    cells.append((rare[0], rare[1]))
    freedom = len(cells) - 1
    statistic = sum((seen - p) ** 2 / p for seen, p in cells)
    return statistic, freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("name", METHODS)
def test_what_is_committed_has_the_targets_law(name):
    statistic, critical = chi_square(METHODS[name], rule_of(METHODS[name].rule))
    assert statistic < critical


class Sorted(RSD):
    """Wrong on purpose: children in another order than that of drawing."""

    def grow(self, tree, limit):
        [law] = yield [ROOT]
        drawn = pick(law, 2, tree.sample)
        tree.add(ROOT, sorted(drawn, key=lambda t: float(law[t])), law)


def test_the_test_sees_guesses_in_another_order_than_drawn():
    statistic, critical = chi_square(Sorted(model="toy"), rule_of("reject"))
    assert statistic > critical


# ---- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [4, 8, 16])
def test_dyspec_equals_the_golden(budget):
    golden = np.load(GOLDEN / "dyspec_tree_reference.npz")
    table, root = torch.tensor(golden["T"]), int(golden["root"])
    tree = grown(DySpec(model="toy", nodes=budget, layered=False), sample=False, start=root, table=table, limit=99)
    assert [root, *tree.tokens] == golden[f"tokens_{budget}"].tolist()
    assert [-1, *(parent + 1 for parent in tree.parents)] == golden[f"parent_{budget}"].tolist()
    values = [1.0]
    for parent, said in zip(tree.parents, tree.said, strict=True):
        values.append(values[parent + 1] * said)
    np.testing.assert_allclose(values, golden[f"value_{budget}"], rtol=1e-6)


def test_sequoias_search_equals_the_authors_code():
    golden = np.load(GOLDEN / "sequoia_tree.npz")
    times = dict(zip(golden["valid_budget"].tolist(), golden["target_time"].tolist(), strict=True))
    rates = golden["p"][1:-1].tolist()
    tree = best_tree(rates, times, depth=int(golden["max_depth"]), draft_time=float(golden["draft_time"]))
    assert tree == [[n for n in row if n >= 0] for row in golden["successors"].tolist()]
    assert levels_of(tree) == [[5], [4, 2, 1, 1, 0], [4, 1, 1, 1, 1, 0, 1, 1]]


def test_sequoias_search_finds_the_best_of_all_trees():
    """Against every tree of up to 6 nodes, written as the parents of its nodes."""
    rates, depth = (0.7, 0.5, 0.2), 4

    def worth(parents):
        children, values, levels = [0] * (len(parents) + 1), [1.0], [1]
        for parent in parents:
            if children[parent] == len(rates) or levels[parent] == depth:
                return 0.0
            values.append(values[parent] * rates[children[parent]])
            levels.append(levels[parent] + 1)
            children[parent] += 1
        return sum(values)

    for nodes in range(1, 7):
        tree = best_tree(rates, {nodes: 1.0}, depth=depth)
        parents = {child: node for node, row in enumerate(tree) for child in row}
        found = worth([parents[node] for node in range(1, nodes)])
        every = (worth(parents) for parents in np.ndindex(*range(1, nodes)))
        assert found == pytest.approx(max(every))


def test_greedy_trees_hold_the_likeliest():
    best = DRAFT[START].argsort(descending=True).tolist()
    tree = grown(RSD(model="toy", branching=[3, 1]), sample=False)
    assert tree.tokens == [*best[:3], *(int(DRAFT[t].argmax()) for t in best[:3])]
    assert tree.parents == [-1, -1, -1, 0, 1, 2]
    beams = grown(RSD(model="toy", width=2, depth=2), sample=False)
    pairs = sorted(((float(DRAFT[START][a] * DRAFT[a][b]), a, b) for a in best[:2] for b in range(SIZE)), reverse=True)
    assert [beams.path(node) for node in (2, 3)] == [[a, b] for _, a, b in pairs[:2]]
    chain = grown(SpecTr(model="toy", drafts=5, depth=3), sample=False)
    assert chain.parents == [-1, 0, 1]
    assert chain.draft("toy", chances=True).is_chain


@pytest.mark.parametrize("name", METHODS)
def test_trees_keep_their_limits(name):
    method = METHODS[name]
    for seed in range(20):
        torch.manual_seed(seed)
        tree = grown(method, sample=True, limit=2)
        draft = tree.draft("toy", chances=True)
        assert max(draft.depths) <= 2
        assert len(tree) <= getattr(method, "nodes", 15)
        for node, drawn in draft.drawn.items():
            assert list(dict.fromkeys(drawn.tokens)) == list(draft.children[node])
            assert name == "spectr" or len(set(drawn.tokens)) == len(drawn.tokens)
        assert all(draft.chances[n] <= (1 if p < 0 else draft.chances[p]) for n, p in enumerate(draft.parents))
        hopeless = grown(method, sample=True, worth=2.0)
        assert len(hopeless) and set(hopeless.parents) == {ROOT}  # the first forward is paid for, no other


@pytest.mark.parametrize("name", METHODS)
def test_few_or_no_possible_tokens(name):
    one = torch.zeros(SIZE, SIZE)
    one[:, 2] = 1
    for sample in (True, False):
        assert set(grown(METHODS[name], sample=sample, table=one).tokens) == {2}
        assert len(grown(METHODS[name], sample=sample, table=torch.zeros(SIZE, SIZE))) == 0


def test_guesses_drawn_without_replacement_have_the_law_of_draws_in_order():
    """Chi-square of 4,000 ordered pairs against ``q(a) q(b) / (1 - q(a))``; 12 cells, alpha 0.001."""
    torch.manual_seed(0)
    q = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for draw in (
        lambda: pick(q, 2, True),
        lambda: grown(RSD(model="toy", width=2, depth=1), sample=True, table=q.expand(4, 4)).tokens,
    ):
        counts = torch.zeros(4, 4)
        for _ in range(4000):
            a, b = draw()
            counts[a, b] += 1
        law = q[:, None] * q / (1 - q[:, None]) * 4000
        off = ~torch.eye(4, dtype=torch.bool)
        assert float(((counts - law) ** 2 / law)[off].sum()) < 31.26  # the 0.999 quantile on 11 degrees of freedom


@pytest.mark.parametrize("free", [True, False])
def test_drawn_guesses_are_never_cut_by_their_chances(free):
    planner = Planner(free)
    for width in (1, 4):
        for _ in range(3):
            planner.times.note(width, float(width**2))  # so that no guess pays
    tree = Tree(True)
    tree.add(tree.add(ROOT, [3], DRAFT[START])[0], [1], DRAFT[3])
    drawn = tree.draft("toy", chances=True)
    taken = Draft(drawn.tokens, drawn.parents, drawn.chances)
    assert [len(draft) for draft in planner.cut([drawn])] == [2]
    assert [len(draft) for draft in planner.cut([taken])] == [0]


def test_chances_follow_what_stood():
    """A draft model that is right half as often as it says."""
    torch.manual_seed(0)
    trust = Trust()
    assert trust(0.6) == pytest.approx(0.6)
    for q in torch.rand(3000).tolist():
        trust.note(q, float(torch.rand(())) < q / 2)
    for q in (0.25, 0.5, 0.75):
        assert trust(q) == pytest.approx(q / 2, rel=0.35)
    assert trust(1.0) < 1


def test_trees_tell_which_guesses_stood():
    tree = Tree(False)
    tree.add(ROOT, [3, 1], DRAFT[START])
    tree.add(1, [2], DRAFT[1])
    told = []
    tree.trust.note = lambda q, stood: told.append((q, stood))
    tree.judge([1, 0, 2])
    assert told == [(float(DRAFT[START][3]), False), (float(DRAFT[START][1]), True), (float(DRAFT[1][2]), False)]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DySpec(model="toy", nodes=0), "nodes"),
        (lambda: DySpec(model="toy", threshold=0.0), "threshold"),
        (lambda: RSD(model="toy", width=True), "width"),
        (lambda: RSD(model="toy", branching=[]), "branching"),
        (lambda: RSD(model="toy", branching=[2, 0]), "branching"),
        (lambda: SpecTr(model="toy", drafts=2.5), "drafts"),
        (lambda: Sequoia(model="toy", rates=[]), "rates"),
        (lambda: Sequoia(model="toy", rates=[0.5, 0.0]), "rates"),
        (lambda: Sequoia(model="toy", rates=[0.5], nodes=9, depth=2), "no tree of 3 levels"),
        (lambda: Sequoia(model="toy", draft_time=-1.0), "draft_time"),
    ],
)
def test_wrong_parameters_say_what_is_wrong(make, says):
    with pytest.raises(ThriftError, match=says) as error:
        make()
    assert "\n" not in str(error.value)
