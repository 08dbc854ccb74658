from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenthrift.core.draft import Draft
from tokenthrift.core.errors import ThriftError
from tokenthrift.decoding.goose import Goose, GooseDrafter
from tokenthrift.decoding.protocols import _shared
from tokenthrift.decoding.spine import Copies, Successors
from tokenthrift.decoding.spine_tree import grow

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "decoding" / "goose.npz")
"""From the matcher, table, tree builder and walk of the authors' code (2kinto/GOOSE_Speculative_Decoding at c5c8bb3),
transcribed statement by statement and run without its model loop; the loop of the generation is ours."""


def known(row, none=-1):
    return [int(t) for t in row if t != none]


def test_trees_equal_the_authors_builder():
    """84 trees over six tables, with all kinds of copies, confidences and budgets."""
    logits, at = torch.tensor(GOLDEN["table_logits"]), 0
    harvests = []
    for tokens, before in zip(GOLDEN["table_tokens"], GOLDEN["table_previous"], strict=True):
        tokens = known(tokens)
        before = [None if t < 0 else int(t) for t in before[: len(tokens)]]
        harvests.append((before, tokens, logits[at : at + len(tokens)]))
        at += len(tokens)
    for row, (confidence, accepted), chain, tokens, parents in zip(
        *(GOLDEN[f"tree_{name}"] for name in ("rows", "shape", "chain", "tokens", "parents")), strict=True
    ):
        table, nodes, depth, k, last, before, length, count, spine_end = row.tolist()
        successors = Successors(k)
        successors.update(*harvests[table])
        context = (None if before < 0 else before, last)
        ours = grow(successors, context, chain[:length].tolist(), confidence, accepted, nodes, depth)
        assert ours[0] == tokens[1:count].tolist()
        assert [parent + 1 for parent in ours[1]] == parents[1:count].tolist()
        assert ours[3] == spine_end - 1
        if count <= 1:
            continue
        draft = Draft(ours[0], ours[1])
        assert all(len(set(t)) == len(list(t)) for t in (list(c) for c in draft.children.values()))
        assert len({(p, t) for p, t in zip(draft.parents, draft.tokens, strict=True)}) == len(draft)  # no twins
        assert len(draft) <= max(nodes + int(confidence * max(0, 100 - nodes)) - 1, ours[3])


def test_copies_and_their_confidence_equal_the_authors_matcher():
    text, copies = GOLDEN["text"].tolist(), Copies()
    for (end, agreed), confidence, chain, extended in zip(
        GOLDEN["look"].tolist(), GOLDEN["confidence"], GOLDEN["chain"], GOLDEN["extended"], strict=True
    ):
        for token in text[len(copies.tokens) : end]:
            copies.append(token)
        ours, sure = copies.copy(copies.tokens[-5:])
        assert ours == known(chain)
        assert sure == pytest.approx(confidence)
        assert copies.find(copies.tokens[-5:])[2] == bool(agreed)
        assert copies.chain(100)[0] == known(extended)


def test_a_whole_generation_drafts_what_the_authors_parts_draft():
    """56 steps of a toy model, ``T1[last] + T2[previous] + T3[position]``: plain steps, trees, spines, long chains."""
    toy = np.load(Path(__file__).parents[1] / "golden" / "decoding" / "token_recycling.npz")
    one, two, three = (torch.tensor(t) for t in (toy["T1"], toy["T2"], GOLDEN["gen_T3"]))
    prompt, text = GOLDEN["gen_prompt"].tolist(), GOLDEN["gen_tokens"].tolist()
    drafter = GooseDrafter(Goose(nodes=40, adaptive=False), Successors(10), prompt)
    draft, at, kinds = Draft(), len(prompt), set()
    steps = [[1, 1, 1, 1], *GOLDEN["gen_steps"].tolist()]  # the first is the prompt's own
    for i, (route, count, spine_end, committed) in enumerate(steps):
        if i:
            draft = drafter.propose(10**6)
            tokens = GOLDEN["gen_draft"][i - 1][:count].tolist()
            assert [text[at - 1], *draft.tokens] == tokens
            assert [p + 1 for p in draft.parents] == GOLDEN["gen_parents"][i - 1][1:count].tolist()
            assert [draft.source(n) for n in range(len(draft))].count("lookup") == spine_end - 1
            kinds.add((route, spine_end > 1, spine_end > 20))
        fed = [text[at - 1], *draft.tokens]
        before = [text[at - 2], *(fed[p + 1] for p in draft.parents)]
        depths = [0, *draft.depths]
        logits = torch.stack(
            [one[t] + two[b] + three[(at - 1 + d) % 61] for t, b, d in zip(fed, before, depths, strict=True)]
        )
        drafter.observe(draft, logits)
        drafter.extend(text[at : at + committed])
        at += committed
    assert at == len(text)
    assert kinds >= {(0, False, False), (2, False, False), (2, True, False), (2, True, True)}


def test_the_accepted_path_is_at_least_as_long_as_the_spines():
    rng, torch_rng = random.Random(0), torch.Generator().manual_seed(0)
    successors = Successors(10)
    successors.update([None] * 30, list(range(30)), torch.randn(30, 30, generator=torch_rng))
    for _ in range(50):
        chain = [rng.randrange(30) for _ in range(rng.randint(1, 15))]
        tokens, parents, _, spine = grow(successors, (None, rng.randrange(30)), chain, 0.4, 0.5)
        draft, node = Draft(tokens, parents), -1
        for token in chain[:spine]:
            node = draft.child(node, token)
            assert node is not None
        assert len(draft) <= Goose().nodes + int(0.4 * 40) - 1
        assert len(draft) > spine  # there are branches


def test_chances_never_grow_downwards_and_follow_what_was_right():
    rng = random.Random(1)
    phrases = [[rng.randrange(30) for _ in range(12)] for _ in range(6)]
    drafter, text = GooseDrafter(Goose(), Successors(10), []), []
    for _ in range(40):
        text += rng.choice(phrases)
    said, right, beside = 0.0, 0, 0
    drafter.extend(text[:100])
    for at in range(100, len(text) - 1):
        draft = drafter.propose(50)
        chances = draft.chances
        assert all(p < 0 or chances[n] <= chances[p] + 1e-9 for n, p in enumerate(draft.parents))
        onward = {p: n for n, p in enumerate(draft.parents) if draft.source(n) == "lookup"}  # the spine, by parent
        for node, parent in enumerate(draft.parents):
            if draft.source(node) == "recycling" and parent in onward:  # is for when the spine is wrong
                assert chances[node] <= (1.0 if parent < 0 else chances[parent]) - chances[onward[parent]] + 1e-9
        if len(draft) and draft.source(0) == "lookup":
            said += chances[0]
            right += draft.tokens[0] == text[at]
        beside += draft.source(len(draft) - 1) == "recycling" if len(draft) else 0
        logits = torch.zeros(len(draft) + 1, 30)
        logits[0, text[at]] = 5.0
        drafter.observe(draft, logits)
        drafter.extend([text[at]])
    assert said == pytest.approx(right, rel=0.15)
    assert right > 100
    assert beside > 50


def test_successors_are_kept_between_requests_if_asked(llama, prompts):
    import tokenthrift as tt

    ids = torch.tensor([prompts(0), prompts(1)])
    with tt.apply("decode=goose()", llama):
        llama.generate(ids, do_sample=False, max_new_tokens=20)
    table = _shared[llama]["goose", 10]
    assert table(None, int(ids[0, -1]))
    pairs = len(table._after_pair)
    with tt.apply("decode=goose(share=False)", llama):
        llama.generate(ids.flip(1), do_sample=False, max_new_tokens=20)
    assert len(table._after_pair) == pairs


def test_old_pairs_are_forgotten(monkeypatch):
    monkeypatch.setattr("tokenthrift.decoding.spine.MANY_PAIRS", 3)
    table = Successors(2)
    for before in (1, 2, 1, 3, 4):
        table.update([before], [0], torch.tensor([[0.0, 1.0 + before, 0.5]]))
    assert sorted(table._after_pair) == [(1, 0), (3, 0), (4, 0)]


@pytest.mark.parametrize("params", [{"nodes": 1}, {"depth": 0}, {"k": 0}, {"nodes": True}])
def test_wrong_parameters_say_what_is_wrong(params):
    with pytest.raises(ThriftError, match=next(iter(params))):
        Goose(**params)
