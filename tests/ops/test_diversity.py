"""Max-min diversity, against the authors' numbers and against a loop that looks at everything anew in every step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tokenthrift.ops import diversity
from tokenthrift.ops.diversity import max_min_diversity

GOLDEN = Path(__file__).parents[1] / "golden" / "multimodal" / "visual_selection.npz"


def brute(features, count):
    x = normalize(features, dim=-1)
    d = 1 - x @ x.T
    d.fill_diagonal_(torch.inf)
    chosen = [int(d.amin(1).argmax())]
    while len(chosen) < count:
        rest = [i for i in range(len(x)) if i not in chosen]
        gaps = [float(d[i, chosen].amin()) for i in rest]
        chosen.append(rest[gaps.index(max(gaps))])
    return chosen


@pytest.mark.parametrize("n", [60, 64, 96])
@pytest.mark.parametrize("whole", [8192, 10])
def test_the_sequence_is_the_authors(n, whole, monkeypatch):
    monkeypatch.setattr(diversity, "WHOLE", whole)
    monkeypatch.setattr(diversity, "BLOCK", 25)
    cases = np.load(GOLDEN)
    wanted = cases[f"divprune_idx_{n}"].tolist()
    assert max_min_diversity(torch.from_numpy(cases[f"divprune_x_{n}"])[None], len(wanted))[0].tolist() == wanted


def test_rows_are_chosen_from_apart_and_each_its_own_number():
    torch.manual_seed(0)
    x, counts = torch.randn(3, 40, 6), torch.tensor([40, 7, 1])
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[1, 30:] = False
    chosen = max_min_diversity(x, counts, mask)
    assert chosen.shape == (3, 40)
    assert chosen[0].tolist() == brute(x[0], 40)
    assert chosen[1].tolist() == brute(x[1, :30], 7) + [-1] * 33
    assert chosen[2].tolist() == brute(x[2], 1) + [-1] * 39


def test_of_equals_the_earlier_comes_and_none_twice():
    x = torch.eye(4).repeat(2, 1)[None]
    assert max_min_diversity(x, 8)[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert max_min_diversity(torch.ones(1, 5, 3), 5)[0].tolist() == [0, 1, 2, 3, 4]
    assert sorted(max_min_diversity(torch.zeros(1, 5, 3), 5)[0].tolist()) == [0, 1, 2, 3, 4]


def test_it_ends_with_the_tokens_that_there_are():
    assert max_min_diversity(torch.randn(1, 3, 4), 10).shape == (1, 3)
    assert max_min_diversity(torch.randn(1, 1, 4), 1).tolist() == [[0]]
    assert max_min_diversity(torch.randn(1, 4, 4), 0).shape == (1, 0)
    mask = torch.tensor([[False, True, False]])
    assert max_min_diversity(torch.randn(1, 3, 4), 2, mask).tolist() == [[1]]


def test_known_distances_are_read_and_left_as_they_are():
    torch.manual_seed(1)
    x = torch.randn(2, 30, 5)
    unit = normalize(x, dim=-1)
    d = 1 - unit @ unit.transpose(1, 2)
    before = d.clone()
    assert max_min_diversity(torch.zeros(2, 30, 1), 9, d=d).equal(max_min_diversity(x, 9))
    assert d.equal(before)
