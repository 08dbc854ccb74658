from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

from tokenthrift.core.errors import ThriftError
from tokenthrift.decoding.aded import Aded, AdedDrafter, _within
from tokenthrift.decoding.protocols import _shared
from tokenthrift.decoding.tree_search import search
from tokenthrift.decoding.trigrams import Trigrams, corpus_of, shares


def text_of(seed: int, length: int, vocabulary: int) -> list[int]:
    rng = random.Random(seed)
    return [min(int(rng.expovariate(3 / vocabulary)), vocabulary - 1) for _ in range(length)]


def table_of(seed: int, length: int = 400, vocabulary: int = 6) -> Trigrams:
    table = Trigrams(shares([text_of(seed, length, vocabulary)]))
    table.look(text_of(seed + 100, 60, vocabulary))
    return table


# ---- the table ------------------------------------------------------------------------------------------------------


def test_a_corpus_gives_the_shares_of_the_twelve_most_frequent_successors():
    table = Trigrams(shares([[1, 2, 3, 1, 2, 3, 1, 2, 4], [1, 2]]))
    assert table[1, 2] == {3: pytest.approx(2 / 3), 4: pytest.approx(1 / 3)}
    assert table[2, 1] == {}
    many = shares([[0, 0, *([9, 0, 0] * 3), 8, *(t for i in range(20, 60) for t in (0, 0, i))]])
    assert len(many[0, 0]) == 12
    assert next(iter(many[0, 0])) == 9


def test_each_step_adds_to_the_trigrams_of_the_last_16_tokens_up_to_3():
    drafter = AdedDrafter(Aded(), Trigrams(), [])
    text = list(range(40))
    for token in text:
        drafter.extend([token])
    # A trigram is among the last 16 tokens for 14 steps, the last ones for fewer.
    assert drafter.table[3, 4] == {5: pytest.approx(0.04 * 14)}
    assert drafter.table[37, 38] == {39: pytest.approx(0.04)}
    assert drafter.table[36, 37] == {38: pytest.approx(0.08)}
    for _ in range(200):
        drafter.extend([7])
    assert drafter.table[7, 7] == {7: 3.0}
    corpus = Trigrams(shares([[1, 2, 3]]))
    corpus.look([1, 2, 3])
    assert corpus[1, 2] == {3: pytest.approx(1.04)}
    assert corpus.corpus[1, 2] == {3: 1.0}  # the corpus itself is not touched


def test_rows_and_pairs_are_bounded(monkeypatch):
    monkeypatch.setattr("tokenthrift.decoding.trigrams.MANY", 5)
    table = Trigrams()
    for token in range(40):
        table.look([0, 1, token])
        table.look([token, 50, 51])
    assert len(table[0, 1]) == 12
    assert 39 in table[0, 1]  # the newest stays
    assert len(table.seen) == 5


# ---- the search -----------------------------------------------------------------------------------------------------


class Plain:
    """The search as the card has it, without any care for time."""

    def __init__(self, table, pair, prior=0.0):
        self.table, self.pair, self.prior = table, pair, prior
        self.children, self.n, self.w = [], 0, 0.0

    def score(self, visits):
        if self.n == 0:
            return math.inf
        return self.w / self.n + (32 + math.log((visits + 9) / 8)) * self.prior * math.sqrt(visits) / (1 + self.n)

    def play(self, draws):
        node, state = self, [self]
        while node.children and len(state) < 4:
            # Of children never visited the last was visited when they were made.
            node = max(node.children, key=lambda child: child.score(node.n))
            state.append(node)
        row = self.table[node.pair]
        if row and len(state) < 4:
            node.children = [Plain(self.table, (node.pair[1], t), p) for t, p in row.items()]
            node = node.children[-1]
            state.append(node)
        reward, pair = 1 + sum(step.prior for step in state[1:]), node.pair
        for _ in range(4 - len(state)):
            row = self.table[pair]
            if not row:
                break
            tokens = list(row)
            at = 0.0 if len(row) == 1 else draws.random() * sum(row.values())
            for token in tokens:
                at -= row[token]
                if at <= 0:
                    break
            reward += row[token]
            pair = (pair[1], token)
        for step in state:
            step.n += 1
            step.w += reward

    def visits(self, path=()):
        out = {path: self.n}
        for child in self.children:
            out |= child.visits((*path, child.pair[1]))
        return out


@pytest.mark.parametrize("seed", range(8))
def test_the_search_visits_what_the_formula_says(seed):
    vocabulary = 3 + seed % 4 * 3
    table = table_of(seed, 300, vocabulary)
    pair = tuple(text_of(seed, 300, vocabulary)[7:9])
    root, draws = Plain(table, pair), random.Random(seed)
    for _ in range(150):
        root.play(draws)
    every = dict(search(table, pair, random.Random(seed), 150, most=10**6))
    assert every == root.visits()


@pytest.mark.parametrize("seed", range(4))
def test_visits_add_up(seed):
    table = table_of(seed)
    every = dict(search(table, (0, 0), random.Random(seed), 150, most=10**6))
    assert every[()] == 150
    assert sum(n for path, n in every.items() if len(path) == 1) == 150
    for path, n in every.items():
        below = sum(m for longer, m in every.items() if len(longer) == len(path) + 1 and longer[: len(path)] == path)
        assert below <= n
    top = search(table, (0, 0), random.Random(seed), 150, most=10)
    assert [n for _, n in top] == sorted(every.values(), reverse=True)[:10]
    assert max(map(len, every)) == 3


# ---- the draft ------------------------------------------------------------------------------------------------------


def test_drafts_are_trees_of_the_table_within_their_bounds():
    for seed in range(10):
        text = text_of(seed, 40, 8)
        drafter = AdedDrafter(Aded(adaptive=False, nodes=30), table_of(seed, 2000, 8), text)
        draft = drafter.propose(100)
        assert 0 < len(draft) <= 30
        assert max(draft.depths) <= 4
        ways = {-1: tuple(text[-2:])}
        for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
            ways[node] = (*ways[parent], token)
            assert token in drafter.table[ways[parent][-2:]]
        assert max(drafter.propose(2).depths) <= 2
        assert not len(drafter.propose(0))


def test_the_longest_paths_are_left_out_the_less_visited_first():
    paths = [(1,), (1, 2), (1, 2, 3), (4, 4, 4), (5, 6, 7), (1, 2)]
    assert _within(paths, 100) == paths[:-1]
    assert _within(paths, 9) == [(1,), (1, 2), (1, 2, 3), (4, 4, 4)]  # 1 + 2 + 3 + 1 + 3 tokens: the last of 3 goes
    assert _within(paths, 4) == [(1,), (1, 2), (4, 4, 4)]


def test_the_same_text_and_seed_give_the_same_drafts():
    def drafts(seed):
        drafter = AdedDrafter(Aded(seed=seed), table_of(1, 2000, 12), text_of(1, 40, 12))
        out = []
        for token in text_of(2, 20, 12):
            drafter.extend([token])
            draft = drafter.propose(9)
            out.append((list(draft.tokens), list(draft.parents), draft.chances))
        return out

    assert drafts(0) == drafts(0)
    assert drafts(0) != drafts(1)


def test_chances_follow_what_was_right():
    """A text whose next token is drawn from two, three in four times the first."""
    rng, text = random.Random(0), [1, 2]
    drafter = AdedDrafter(Aded(), Trigrams(), text)
    said, right = 0.0, 0
    for _ in range(1500):
        nxt = 3 - text[-1] if rng.random() < 0.75 else text[-1] % 2 + 3 if text[-1] < 3 else text[-1] - 2
        nxt = nxt if nxt > 0 else 1
        draft = drafter.propose(5)
        chances = draft.chances or []
        assert all(p < 0 or chances[n] <= chances[p] for n, p in enumerate(draft.parents))
        first = [n for n, p in enumerate(draft.parents) if p < 0]
        said += sum(chances[n] for n in first)
        right += any(draft.tokens[n] == nxt for n in first)
        drafter.extend([nxt])
        text.append(nxt)
    assert right > 1000
    assert said == pytest.approx(right, rel=0.15)


# ---- requests -------------------------------------------------------------------------------------------------------


def request_of(model):
    return SimpleNamespace(model=model)


def test_a_corpus_file_of_token_ids_fills_the_table(llama, tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(map(json.dumps, [[1, 2, 3, 1, 2, 4], [1, 2, 3]])) + "\n")
    drafter = Aded(corpus=str(path), share=False, adaptive=False).start([9, 1, 2], request_of(llama))
    assert drafter.table[1, 2] == {3: pytest.approx(2 / 3), 4: pytest.approx(1 / 3)}
    assert set(drafter.propose(1).tokens) == {3, 4}
    path.write_text('["a"]\n')
    with pytest.raises(ThriftError, match="line 1 of the corpus"):
        Aded(corpus=str(path), share=False, prompt=False).start([1, 2], request_of(llama))


def test_texts_in_a_corpus_need_the_models_tokenizer(llama, tmp_path, monkeypatch):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps("a b c") + "\n")
    with pytest.raises(ThriftError, match="tokenizer is not found"):
        corpus_of(str(path), 0.0, str(tmp_path))
    method = Aded(corpus=str(path), share=False)
    monkeypatch.setattr(
        "tokenthrift.decoding.trigrams._tokenizer",
        lambda path, model: lambda text, **_: SimpleNamespace(input_ids=[ord(c) for c in text]),
    )
    assert method.start([1], request_of(llama)).table[ord("a"), ord(" ")] == {ord("b"): 1.0}


def test_the_table_is_kept_between_requests_if_asked(llama, prompts):
    import tokenthrift as tt

    ids = torch.tensor([prompts(0), prompts(1)])
    with tt.apply("decode=aded()", llama):
        llama.generate(ids, do_sample=False, max_new_tokens=20)
    table = _shared[llama]["aded", None]
    seen = {pair: dict(row) for pair, row in table.seen.items()}
    assert seen
    with tt.apply("decode=aded(share=False)", llama):
        llama.generate(ids, do_sample=False, max_new_tokens=20)
    assert table.seen == seen


@pytest.mark.parametrize("prompt", [[], [3], [3, 4]])
def test_short_prompts(llama, prompt):
    drafter = Aded(share=False).start(prompt, request_of(llama))
    assert not len(drafter.propose(5))
    drafter.extend([5])
    drafter.extend([5, 5, 5, 5])
    assert set(drafter.propose(5).tokens) == {5}


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"rounds": 0}, "rounds"),
        ({"paths": 1}, "at least 2"),
        ({"nodes": 1.5}, "nodes"),
        ({"seed": -1}, "seed"),
        ({"corpus": "nowhere.jsonl"}, "no corpus file"),
    ],
)
def test_wrong_parameters_say_what_is_wrong(params, says):
    with pytest.raises(ThriftError, match=says):
        Aded(**params)
