"""MrT5's hard deletion against the authors' numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tokenthrift.core.tokenmap import TokenMap
from tokenthrift.ops.deletion import delete_bias, hard_delete

GOLDEN = Path(__file__).parents[1] / "golden" / "vision" / "mrt5_hard_delete.npz"


def golden():
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN).items()}


def test_equals_the_official_deletion():
    g = golden()
    map = hard_delete(g["gate"].squeeze(-1), float(g["threshold"]))
    real = g["new_mask"].squeeze(-1) == 0
    assert torch.equal(map.mask, real)
    assert torch.equal(map.positions()[real], g["positions"][real])
    assert torch.equal(map.apply(g["hidden"])[real], g["new_hidden"][real])
    assert torch.equal(delete_bias(map, g["position_bias"]), g["new_position_bias"])


def test_padding_is_deleted_and_one_bias_holds_for_all_rows():
    g = golden()
    gate, bias = g["gate"].squeeze(-1), g["position_bias"]
    mask = torch.ones_like(gate, dtype=torch.bool)
    mask[:, 6:] = False
    map = hard_delete(gate, -15, mask)
    assert torch.equal(map.kept, (gate > -15) & mask)
    same = delete_bias(map, bias[:1].expand(3, -1, -1, -1))
    assert torch.equal(delete_bias(map, bias[:1]), same)


def test_an_open_gate_changes_nothing_and_a_closed_one_leaves_nothing():
    g = golden()
    gate = torch.zeros(3, 12)
    assert hard_delete(gate, -15).is_identity
    assert torch.equal(delete_bias(hard_delete(gate, -15), g["position_bias"]), g["position_bias"])
    assert hard_delete(gate - 30, -15).n_out == 0


def test_merged_tokens_have_no_position_bias():
    with pytest.raises(ValueError, match="merged"):
        delete_bias(TokenMap.merge(torch.tensor([[0, 0, 1]])), torch.zeros(1, 1, 3, 3))
