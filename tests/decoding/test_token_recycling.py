from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tokenthrift.core.draft import Draft
from tokenthrift.core.errors import ThriftError
from tokenthrift.decoding.protocols import _shared
from tokenthrift.decoding.token_recycling import RecyclingDrafter, Successors, TokenRecycling

GOLDEN = Path(__file__).parents[1] / "golden" / "decoding" / "token_recycling.npz"


class Trie:
    """The tables' logits after a path: ``T1[last] + T2[previous]``."""

    def __init__(self, golden):
        self.one, self.two = torch.tensor(golden["T1"]), torch.tensor(golden["T2"])

    def logits(self, text, draft):
        paths = [[]]
        for token, parent in zip(draft.tokens, draft.parents, strict=True):
            paths.append([*paths[parent + 1], token])
        full = [[0, *text, *path] for path in paths]
        return torch.stack([self.one[p[-1]] + self.two[p[-2]] for p in full])


def test_trees_updates_and_output_equal_the_authors_code():
    golden = np.load(GOLDEN)
    model, text = Trie(golden), golden["prompt"][0].tolist()
    matrix = Successors(48, 8)
    matrix.table[:] = 0  # as the authors' code begins: token 0 follows everything
    drafter = RecyclingDrafter(TokenRecycling(adaptive=False, prompt=False, share=False), matrix, text)
    for step, count in enumerate(golden["accept_lengths"].tolist()):
        draft = drafter.propose(10**6)
        logits = model.logits(text, draft)
        best = logits.argmax(-1).tolist()
        if step < len(golden["drafts"]):
            assert [text[-1], *draft.tokens] == golden["drafts"][step].tolist()
            assert best == golden["preds"][step].tolist()
        new, node = [], -1
        while node is not None:
            new.append(best[node + 1])
            node = draft.child(node, new[-1])
        assert len(new) == count
        drafter.observe(draft, logits)
        if step < len(golden["adj_steps"]):
            np.testing.assert_array_equal(matrix.table, golden["adj_steps"][step])
        drafter.extend(new)
        text += new
    assert text[:74] == golden["output"][0].tolist()  # theirs is cut at its maximal length


def path_of(draft, node):
    out = []
    while node >= 0:
        out.insert(0, draft.tokens[node])
        node = draft.parents[node]
    return out


def test_the_whole_template_has_the_papers_shape():
    golden = np.load(GOLDEN)
    matrix = Successors(48, 8)
    matrix.table[:] = torch.arange(8)
    drafter = RecyclingDrafter(TokenRecycling(adaptive=False), matrix, [5])
    draft = drafter.propose(100)
    paths = [[t for t in row if t >= 0] for row in golden["template"].tolist()]
    assert [path_of(draft, i) for i in range(len(draft))] == paths
    np.testing.assert_array_equal(draft.ancestors(), golden["tree_attention"].astype(bool))
    assert [0, *draft.depths] == golden["tree_depth"].tolist()
    assert len(RecyclingDrafter(TokenRecycling(adaptive=False, nodes=9), matrix, [5]).propose(100)) == 9
    assert max(drafter.propose(2).depths) == 2


def test_after_a_step_the_row_of_every_token_is_the_top_of_its_logits():
    torch.manual_seed(0)
    drafter = RecyclingDrafter(TokenRecycling(k=3), Successors(20, 3), [4])
    draft, logits = Draft([7, 4, 9], [-1, 0, 0]), torch.randn(4, 20)
    drafter.observe(draft, logits)
    top = logits.topk(3).indices
    assert drafter.matrix[[7, 4, 9]] == [top[1].tolist(), top[2].tolist(), top[3].tolist()]  # of two 4s the last


def test_generation_is_exact_and_learns_for_later_requests(llama, prompts):
    import tokenthrift as tt

    ids = torch.tensor([prompts(0), prompts(1)])
    plain = llama.generate(ids, do_sample=False, max_new_tokens=60)
    for _ in range(2):
        # Not adaptive: whether drafts pay on a model this small depends on how busy the machine is.
        with tt.apply("decode=token_recycling(adaptive=False)", llama) as session:
            assert llama.generate(ids, do_sample=False, max_new_tokens=60).tolist() == plain.tolist()
        assert session.records["decode"].tokens_after < 60
        assert session.records["decode"].extra["accepted"] > 0
    learned = _shared[llama]["token_recycling", 8].table.clone()
    assert (learned >= 0).any()
    with tt.apply("decode=token_recycling(share=False)", llama):
        llama.generate(ids.flip(1), do_sample=False, max_new_tokens=60)
    assert torch.equal(_shared[llama]["token_recycling", 8].table, learned)


def test_the_best_tree_follows_the_measured_ranks():
    matrix = Successors(48, 3)
    matrix.table[:] = torch.arange(3)
    method = TokenRecycling(k=3, nodes=6, adaptive=False, tree="sequoia")
    matrix.trust = [0.99, 0.01, 0.01]
    assert RecyclingDrafter(method, matrix, [5]).propose(100).is_chain
    matrix.trust = [0.4, 0.4, 0.1]
    draft = RecyclingDrafter(method, matrix, [5]).propose(100)
    assert (draft.tokens, draft.parents) == ([0, 1, 0, 1, 0, 1], [-1, -1, 0, 0, 1, 1])


def test_the_best_tree_is_exact(llama, prompts):
    import tokenthrift as tt

    ids = torch.tensor([prompts(0), prompts(1)])
    plain = llama.generate(ids, do_sample=False, max_new_tokens=40)
    with tt.apply("decode=token_recycling(tree=sequoia, nodes=12, adaptive=false)", llama) as session:
        assert llama.generate(ids, do_sample=False, max_new_tokens=40).tolist() == plain.tolist()
    assert session.records["decode"].extra["drafted"] > 0


def test_wrong_parameters_say_what_is_wrong():
    with pytest.raises(ThriftError, match="at least 1"):
        TokenRecycling(k=0)
    with pytest.raises(ThriftError, match="'sequoia'"):
        TokenRecycling(tree="redwood")
