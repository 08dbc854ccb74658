"""Super token sampling as a TokenMap: the same numbers as the sparse operation, and no mass lost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenthrift.ops.super_tokens import association_map, pad_to_cells, spread, super_tokens

close = {"rtol": 1e-5, "atol": 1e-5}


def by_hand(x, cell, tokens):
    """Dense association ``(batch, super tokens, pixels)``: every pair written out, far pairs zero."""
    batch, channels, height, width = x.shape
    rows, columns = tokens.shape[-2:]
    p = torch.zeros(batch, rows * columns, height * width)
    for y in range(height):
        for z in range(width):
            near = [(y // cell[0] + i, z // cell[1] + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            inside = [(i, j) for i, j in near if 0 <= i < rows and 0 <= j < columns]
            logits = torch.stack([(x[:, :, y, z] * tokens[:, :, i, j]).sum(1) for i, j in inside], 1) / channels**0.5
            zeros = torch.zeros(batch, 9 - len(inside))
            q = torch.cat([logits, zeros], 1).softmax(1)
            for n, (i, j) in enumerate(inside):
                p[:, i * columns + j, y * width + z] = q[:, n]
    return p


@pytest.mark.parametrize("cell", [(2, 2), (2, 3), (4, 1)])
def test_one_round_is_what_the_paper_says(cell):
    x = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(0)) * 2
    tokens, association = super_tokens(x, cell)
    means = x.unfold(2, cell[0], cell[0]).unfold(3, cell[1], cell[1]).mean((-1, -2))
    p = by_hand(x, cell, means)
    pixels = x.flatten(2).transpose(1, 2)
    expected = p @ pixels / p.sum(-1, keepdim=True)
    torch.testing.assert_close(tokens.flatten(2).transpose(1, 2), expected, **close)
    back = p.transpose(1, 2) @ tokens.flatten(2).transpose(1, 2)
    torch.testing.assert_close(spread(tokens, association, cell).flatten(2).transpose(1, 2), back, **close)

    map = association_map(association, 1, 4, 6, cell)
    share = p / p.sum(1, keepdim=True)  # neighbours outside the map have no part
    torch.testing.assert_close(map.dense_share(), share, **close)
    torch.testing.assert_close(map.dense(), share / share.sum(-1, keepdim=True), **close)


@given(
    h=st.integers(1, 7),
    w=st.integers(1, 7),
    high=st.integers(1, 3),
    wide=st.integers(1, 3),
    frames=st.integers(1, 3),
    prefix=st.integers(0, 2),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_laws_of_the_map(h, w, high, wide, frames, prefix, scale, seed):
    x = scale * torch.randn(2 * frames, 4, h, w, generator=torch.Generator().manual_seed(seed))
    _, association = super_tokens(pad_to_cells(x, (high, wide), "replicate"), (high, wide))
    map = association_map(association, frames, h, w, (high, wide), prefix)
    assert map.n_in == prefix + frames * h * w
    assert map.n_out == prefix + frames * -(-h // high) * -(-w // wide)
    torch.testing.assert_close(map.dense().sum(-1), torch.ones(2, map.n_out), **close)
    torch.testing.assert_close(map.sizes().sum(-1), torch.full((2,), float(map.n_in)), **close)
    y = torch.randn(2, map.n_in, 3, generator=torch.Generator().manual_seed(seed))
    merged = map.apply(y)
    torch.testing.assert_close(merged, map.dense() @ y, **close)
    assert torch.equal(merged[:, :prefix], y[:, :prefix])
    constant = torch.full((2, map.n_out, 1), 0.7)
    torch.testing.assert_close(map.unmerge(constant), torch.full((2, map.n_in, 1), 0.7), **close)


def test_a_super_token_that_nobody_resembles_is_the_mean_of_its_cell():
    association = torch.zeros(1, 2, 2, 9)
    association[:, 0, :, 4] = 1  # cells (0, 0) and (0, 1); all pixels belong to the first
    association[:, 1, :, 3] = 1
    map = association_map(association, 1, 1, 4, (1, 2))
    assert torch.equal(map.dense(), torch.tensor([[[0.25, 0.25, 0.25, 0.25], [0, 0, 0.5, 0.5]]]))
    assert map.sizes().tolist() == [[4, 0]]


def test_gradients_reach_the_pixels():
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    tokens, association = super_tokens(x, (2, 2), 2)
    assert not association.requires_grad
    tokens.sum().backward()
    assert x.grad.abs().sum() > 0
