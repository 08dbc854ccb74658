"""The dynamic block map against the authors' numbers, and its laws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import one_hot, scaled_dot_product_attention

from tokenthrift.ops.block_maps import block_density, dynamic_block_map, expand_block_map

GOLDEN = Path(__file__).parents[1] / "golden" / "vision" / "svg2_dynamic_map.npz"


def golden():
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN).items()}


@pytest.mark.parametrize("case", ["p90", "p30min"])
def test_equals_the_official_map_and_its_attention(case):
    g = golden()
    top_p, min_share = g[f"{case}_p_min"].tolist()
    blocks = dynamic_block_map(g["q_cent"], g["k_cent"], g["k_sizes"], top_p, min_share).unsqueeze(0)
    assert torch.equal(blocks, g[f"{case}_map"])
    mask = expand_block_map(blocks, g["q_labels"][None], g["k_labels"][None])
    out = scaled_dot_product_attention(g["q"], g["k"], g["v"], attn_mask=mask)
    torch.testing.assert_close(out, g[f"{case}_out_masked_ref"], rtol=1e-5, atol=1e-6)
    expected = mask.float().mean((-1, -2))
    torch.testing.assert_close(block_density(blocks, g["q_sizes"], g["k_sizes"]), expected)


@given(top_p=st.floats(0, 1), min_share=st.floats(0, 1), seed=st.integers(0, 2**16))
def test_laws(top_p, min_share, seed):
    generator = torch.Generator().manual_seed(seed)
    queries, keys = torch.randn(2, 4, 8, generator=generator), torch.randn(2, 7, 8, generator=generator)
    sizes = torch.randint(0, 5, (2, 7), generator=generator)
    sizes[:, 0] = 1
    blocks = dynamic_block_map(queries, keys, sizes, top_p, min_share)
    weight = (queries @ keys.transpose(-1, -2) / 8**0.5).exp() * sizes[:, None]
    weight = weight / weight.sum(-1, keepdim=True)
    covered = (weight * blocks).sum(-1)
    assert (covered > top_p - 1e-5).all()
    assert (blocks.sum(-1) >= max(1, int(min_share * 7))).all()
    lightest = torch.where(blocks, weight, torch.inf).amin(-1)
    assert (torch.where(blocks, 0, weight).amax(-1) <= lightest).all()  # what is left out is lighter
    enough = blocks.sum(-1) > max(1, int(min_share * 7))
    assert (covered - lightest <= top_p + 1e-5)[enough].all()  # and without the last one it would not do


def test_all_of_the_attention_is_dense_attention():
    g = golden()
    blocks = dynamic_block_map(g["q_cent"], g["k_cent"], g["k_sizes"], 1.0)
    assert blocks.all() and (block_density(blocks, g["q_sizes"], g["k_sizes"]) == 1).all()


def test_empty_clusters_are_left_out():
    g = golden()
    sizes = g["k_sizes"].clone()
    sizes[:, 2] = 0
    assert not dynamic_block_map(g["q_cent"], g["k_cent"], sizes, 1.0)[..., 2].any()


def test_labels_address_the_blocks():
    blocks = torch.tensor([[True, False], [False, True]])
    rows, columns = torch.tensor([0, 1, 1]), torch.tensor([1, 0])
    expected = one_hot(rows, 2).float() @ blocks.float() @ one_hot(columns, 2).float().T
    assert torch.equal(expand_block_map(blocks, rows, columns), expected.bool())
