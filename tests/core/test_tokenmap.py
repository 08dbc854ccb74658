"""TokenMap against dense matrices: whatever a map does must be what its matrix W (and shares P) would do."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tokenthrift.core.tokenmap import TokenMap

LEADS = [(1,), (2,), (1, 2), (2, 2)]
HALVES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
masses = st.floats(0.125, 8, width=16)


# ---- strategies: every map comes with nothing but its public constructor -------------------------------------------


def tensor(draw, lead, values, length, dtype=torch.float32):
    """``(*lead, length)`` of values drawn from the strategy ``values``."""
    flat = draw(st.lists(values, min_size=math.prod(lead) * length, max_size=math.prod(lead) * length))
    return torch.tensor(flat, dtype=dtype).reshape(*lead, length)


@st.composite
def selections(draw, lead, n_in):
    """Any order, padding anywhere, rows of different lengths; also no token at all."""
    n_out = draw(st.integers(0, n_in + 1))
    rows = []
    for _ in range(math.prod(lead)):
        row = draw(st.permutations(range(n_in)))[:n_out]
        row = [token if draw(st.booleans()) or draw(st.booleans()) else -1 for token in row]
        rows.append(row + [-1] * (n_out - len(row)))
    return TokenMap.select(torch.tensor(rows, dtype=torch.int64).reshape(*lead, n_out), n_in)


@st.composite
def ragged(draw, lead, n_in):
    return TokenMap.keep(tensor(draw, lead, st.booleans(), n_in, torch.bool))


@st.composite
def merges(draw, lead, n_in):
    n_out = draw(st.integers(0, n_in + 1))
    group = tensor(draw, lead, st.integers(-1, n_out - 1), n_in, torch.int64)
    weight = tensor(draw, lead, masses, n_in) if draw(st.booleans()) else None
    anchor = None
    if n_in and draw(st.booleans()):
        anchor = tensor(draw, lead, st.integers(0, n_in - 1), n_out, torch.int64)
    return TokenMap.merge(group, n_out, weight, anchor)


@st.composite
def transforms(draw, lead, n_in):
    """Many-to-many: each token splits its mass over some outputs (all of it, or it is dropped)."""
    n_out = draw(st.integers(0, n_in + 1))
    share = tensor(draw, lead, st.sampled_from([0.0, 0.0, 1.0, 2.0, 5.0]), n_out * n_in).reshape(*lead, n_out, n_in)
    share = share / share.sum(-2, keepdim=True).clamp(min=1)
    return TokenMap.transform(share, tensor(draw, lead, masses, n_in) if draw(st.booleans()) else None)


def exclusives(lead, n_in):
    return selections(lead, n_in) | ragged(lead, n_in) | merges(lead, n_in)


def maps(lead, n_in):
    return exclusives(lead, n_in) | transforms(lead, n_in)


@st.composite
def chains(draw, length, of=maps):
    """Maps that follow one another."""
    lead, n = draw(st.sampled_from(LEADS)), draw(st.integers(0, 5))
    chain = []
    for _ in range(length):
        chain.append(draw(of(lead, n)))
        n = chain[-1].n_out
    return chain


def any_map(of=maps):
    return chains(1, of).map(lambda chain: chain[0])


# ---- helpers ---------------------------------------------------------------------------------------------------------


def features(shape: tuple[int, ...], dim: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dim, generator=torch.Generator().manual_seed(0)).to(dtype)


def shares(m: TokenMap) -> Tensor:
    """``P`` from the public attributes alone."""
    given = torch.ones_like(m.weight) if m.share is None else m.share
    out = torch.zeros(*m.lead, m.n_out + 1, m.n_in)
    for row in torch.cartesian_prod(*(torch.arange(n) for n in (*m.lead, m.n_edges))).reshape(-1, len(m.lead) + 1):
        edge = tuple(row.tolist())
        out[(*edge[:-1], int(m.target[edge]), int(m.source[edge]))] += given[edge]  # -1 is the spare last row
    return out[..., :-1, :]


def provenance_matrix(m: TokenMap) -> Tensor:
    """``W`` as :meth:`TokenMap.provenance` tells it."""
    out = torch.zeros(math.prod(m.lead), m.n_out, m.n_in)
    for b, row in enumerate(m.provenance()):
        for o, pairs in enumerate(row):
            for token, weight in pairs:
                out[b, o, token] += weight
    return out.reshape(*m.lead, m.n_out, m.n_in)


def close(a: Tensor, b: Tensor, tol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def only_real_anchors(chain: list[TokenMap]) -> bool:
    """No map of the chain stands on the padding of the one before."""
    pairs = itertools.pairwise(chain)
    return all(not a.n_out or bool((a.mask.gather(-1, b.anchors) | ~b.mask).all()) for a, b in pairs)


def same(a: TokenMap, b: TokenMap) -> None:
    assert (a.lead, a.n_in, a.n_out) == (b.lead, b.n_in, b.n_out)
    close(a.dense(), b.dense())
    close(shares(a), shares(b))
    assert torch.equal(a.mask, b.mask)
    assert torch.equal(a.anchors * a.mask, b.anchors * b.mask)


# ---- what a map says of itself ---------------------------------------------------------------------------------------


@given(any_map())
def test_weights_of_every_real_output_sum_to_one(m):
    close(m.dense().sum(-1), m.mask.float())
    assert (m.dense() >= 0).all()


@given(any_map())
def test_mask_kept_and_owner_are_those_of_the_matrix(m):
    p = shares(m)
    assert torch.equal(m.mask, (p > 0).any(-1))
    assert torch.equal(m.kept, (p > 0).any(-2))
    fan_out = (p > 0).sum(-2)
    assert m.exclusive == bool((fan_out <= 1).all())
    assert torch.equal(m.owner < 0, ~m.kept)
    assert m.owner.dtype == torch.int64
    for where in m.kept.nonzero().tolist():
        *lead, token = where
        column = p[(*lead, slice(None), token)]
        assert column[int(m.owner[tuple(where)])] == column.max()


@given(any_map())
def test_dense_is_what_provenance_says(m):
    close(provenance_matrix(m), m.dense())
    assert all(pairs == sorted(pairs) for row in m.provenance() for pairs in row)


def test_select_keep_and_merge_by_hand():
    m = TokenMap.select(torch.tensor([[2, 0, -1]]), 4)
    assert m.dense().tolist() == [[[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]]
    assert m.mask.tolist() == [[True, True, False]]
    assert m.kept.tolist() == [[True, False, True, False]]
    assert m.owner.tolist() == [[1, -1, 0, -1]]
    assert m.is_selection and m.exclusive and not m.is_identity

    m = TokenMap.keep(torch.tensor([[False, True, False, True], [True, False, False, False]]))
    assert m.provenance() == [[[(1, 1.0)], [(3, 1.0)]], [[(0, 1.0)], []]]

    m = TokenMap.merge(torch.tensor([[0, 1, 0, -1]]), weight=torch.tensor([[3.0, 1, 1, 1]]))
    assert m.provenance() == [[[(0, 0.75), (2, 0.25)], [(1, 1.0)]]]
    assert m.owner.tolist() == [[0, 1, 0, -1]]
    assert not m.is_selection and m.exclusive


def test_transform_weighs_shares_by_sizes():
    share = torch.tensor([[[0.5, 1.0], [0.5, 0.0]]])
    close(TokenMap.transform(share).dense(), torch.tensor([[[1 / 3, 2 / 3], [1, 0]]]))
    close(TokenMap.transform(share, torch.tensor([[4.0, 1]])).dense(), torch.tensor([[[2 / 3, 1 / 3], [1, 0]]]))
    close(TokenMap.transform(share.bfloat16()).dense(), TokenMap.transform(share).dense())


def test_a_group_without_mass_is_a_plain_mean():
    m = TokenMap.merge(torch.tensor([[0, 0, 1, 1, -1]]), weight=torch.tensor([[0.0, 0, 1, 3, 0]]))
    close(m.dense(), torch.tensor([[[0.5, 0.5, 0, 0, 0], [0, 0, 0.25, 0.75, 0]]]))


def test_identity_is_one_and_nothing_else_is():
    assert TokenMap.identity(4).is_identity
    assert TokenMap.keep(torch.ones(2, 3, dtype=torch.bool)).is_identity
    assert TokenMap.merge(torch.arange(4)[None]).is_identity
    assert not TokenMap.select(torch.tensor([[1, 0]]), 2).is_identity
    assert not TokenMap.select(torch.tensor([[0, -1]]), 2).is_identity
    assert not TokenMap.select(torch.tensor([[0, 1]]), 3).is_identity


def test_repr_is_short():
    assert repr(TokenMap.identity(3, (2,))) == "TokenMap(3 -> 3, lead=(2,), edges=3)"


# ---- apply and unmerge -----------------------------------------------------------------------------------------------


@given(any_map())
def test_apply_is_the_matrix_product(m):
    x = features((*m.lead, m.n_in))
    close(m.apply(x), m.dense() @ x)
    assert m.apply(x).shape == (*m.lead, m.n_out, 3)


@given(any_map(), st.sampled_from(HALVES))
def test_padding_outputs_are_zero_even_beside_infinities(m, dtype):
    x = torch.full((*m.lead, m.n_in, 2), math.inf, dtype=dtype)
    assert (m.apply(x)[~m.mask] == 0).all()
    assert m.apply(x).dtype == dtype


@given(any_map(exclusives))
def test_dropped_tokens_leave_no_trace(m):
    x = features((*m.lead, m.n_in))
    poisoned = torch.where(m.kept.unsqueeze(-1), x, math.nan)
    assert torch.equal(m.apply(poisoned), m.apply(x))


@given(any_map(lambda lead, n: selections(lead, n) | ragged(lead, n)), st.sampled_from([*HALVES, torch.int64]))
def test_selections_are_bit_exact(m, dtype):
    x = (features((*m.lead, m.n_in)) * 1000).to(dtype)
    out = m.apply(x)
    for b, row in enumerate(m.provenance()):
        for o, pairs in enumerate(row):
            expected = x.reshape(-1, m.n_in, 3)[b, pairs[0][0]] if pairs else torch.zeros(3, dtype=dtype)
            assert torch.equal(out.reshape(-1, m.n_out, 3)[b, o], expected)
    assert torch.equal(m.unmerge(out), torch.where(m.kept.unsqueeze(-1), x, 0))


@given(any_map(), st.sampled_from(HALVES[1:]))
def test_half_precision_is_the_rounded_float32_result(m, dtype):
    x = features((*m.lead, m.n_in), dtype=dtype)
    assert torch.equal(m.apply(x), m.apply(x.float()).to(dtype))
    y = features((*m.lead, m.n_out), dtype=dtype)
    assert torch.equal(m.unmerge(y), m.unmerge(y.float()).to(dtype))


def test_large_groups_neither_overflow_nor_drift_in_half_precision():
    m = TokenMap.merge(torch.zeros(1, 5000, dtype=torch.int64))
    x = torch.full((1, 5000, 1), 100.5)
    assert m.apply(x.half()).item() == 100.5  # the plain sum, 502500, is beyond float16
    assert m.apply(x.bfloat16()).item() == 100.5


def test_double_precision_stays_double():
    x = torch.tensor([[[1e-12], [1.0]]], dtype=torch.float64)
    assert TokenMap.merge(torch.zeros(1, 2, dtype=torch.int64)).apply(x).item() == 0.5 + 0.5e-12


@given(any_map(exclusives))
def test_reduce_after_lift_is_the_identity_for_exclusive_maps(m):
    y = features((*m.lead, m.n_out))
    close(m.apply(m.unmerge(y)), y * m.mask.unsqueeze(-1))


@given(any_map())
def test_reduce_after_pinv_lift_is_the_identity_at_full_rank(m):
    w = m.dense().flatten(0, -3)
    smallest = [torch.linalg.svdvals(row[mask])[-1:] for row, mask in zip(w, m.mask.flatten(0, -2), strict=True)]
    assume((m.mask.sum(-1) <= m.n_in).all() and all((s > 0.05).all() for s in smallest))
    y = features((*m.lead, m.n_out))
    close(m.apply(m.unmerge(y, lift="pinv")), y * m.mask.unsqueeze(-1), 1e-3)


@given(any_map(exclusives))
def test_copy_lift_after_reduce_is_a_projection(m):
    def project(x):
        return m.unmerge(m.apply(x))

    x = features((*m.lead, m.n_in))
    close(project(project(x)), project(x))


@given(any_map())
def test_pinv_lift_after_reduce_is_a_projection(m):
    def project(x):
        return m.unmerge(m.apply(x), lift="pinv")

    assume((torch.linalg.svdvals(m.dense()).flatten() - 0.025).abs().min() > 0.0249 if m.dense().numel() else True)
    x = features((*m.lead, m.n_in))
    close(project(project(x)), project(x), 1e-3)
    assert (project(x)[~m.kept].abs() < 1e-4).all()


@given(any_map())
def test_copy_lift_gives_each_token_the_share_weighted_mean_of_its_outputs(m):
    p = shares(m)
    y = features((*m.lead, m.n_out))
    back = p / p.sum(-2, keepdim=True).clamp(min=1e-9)
    close(m.unmerge(y), back.mT @ y)


@given(any_map(), st.sampled_from(["copy", "pinv"]))
def test_fill_takes_the_place_of_the_dropped(m, lift):
    y, fill = features((*m.lead, m.n_out)), torch.full((*m.lead, m.n_in, 3), 7.0)
    out = m.unmerge(y, fill, lift=lift)
    assert (out[~m.kept] == 7).all()
    assert torch.equal(out[m.kept], m.unmerge(y, lift=lift)[m.kept])


# ---- sizes and positions ---------------------------------------------------------------------------------------------


@given(any_map(), st.data())
def test_sizes_are_conserved(m, data):
    sizes = tensor(data.draw, m.lead, masses, m.n_in)
    close(m.sizes(sizes).sum(-1), (sizes * m.kept).sum(-1))
    close(m.sizes().sum(-1), m.kept.sum(-1).float())
    close(m.sizes(sizes), (shares(m) @ sizes.unsqueeze(-1)).squeeze(-1))


@given(chains(2), st.data())
def test_sizes_of_a_composition_are_chained_sizes(chain, data):
    a, b = chain
    sizes = tensor(data.draw, a.lead, masses, a.n_in)
    close(a.then(b).sizes(sizes), b.sizes(a.sizes(sizes)))
    close(a.then(b).sizes(), b.sizes(a.sizes()))


@given(any_map(), st.data())
def test_positions(m, data):
    custom = tensor(data.draw, m.lead, st.integers(0, 100), m.n_in, torch.int64)
    for positions in (None, custom):
        p = torch.arange(m.n_in).expand(*m.lead, m.n_in) if positions is None else positions
        w = m.dense()
        far = torch.where(w > 0, p.unsqueeze(-2), 1000)
        first = far.amin(-1) if m.n_in else torch.zeros(*m.lead, m.n_out, dtype=torch.int64)
        assert torch.equal(m.positions("first", positions), torch.where(m.mask, first, 0))
        close(m.positions("mean", positions), (w @ p.unsqueeze(-1).float()).squeeze(-1), 1e-4)
        anchored = p.gather(-1, m.anchors) if m.n_in else torch.zeros_like(first)
        assert torch.equal(m.positions("anchor", positions), torch.where(m.mask, anchored, 0))
    assert m.positions("first").dtype == m.positions("anchor").dtype == torch.int64


@given(any_map())
def test_anchors_are_the_given_ones_or_the_heaviest_sources(m):
    if m.anchor is not None:
        assert m.anchors is m.anchor
        return
    for where in m.mask.nonzero().tolist():
        row = m.dense()[tuple(where)]
        assert row[m.anchors[tuple(where)]] == row.max()


def test_positions_by_hand():
    m = TokenMap.merge(
        torch.tensor([[0, 1, 0, -1]]), weight=torch.tensor([[1.0, 1, 3, 1]]), anchor=torch.tensor([[0, 1]])
    )
    assert m.positions().tolist() == [[0, 1]]
    assert m.positions("mean").tolist() == [[1.5, 1]]
    assert m.positions("anchor", torch.tensor([[10, 20, 5, 40]])).tolist() == [[10, 20]]
    assert m.positions("first", torch.tensor([[10, 20, 5, 40]])).tolist() == [[5, 20]]
    equal = TokenMap.merge(torch.tensor([[1, 0, 0, 1]]))
    assert equal.anchors.tolist() == [[1, 0]]  # the first of equally heavy sources
    with pytest.raises(ValueError, match="unknown position mode 'last'"):
        m.positions("last")


# ---- composition -----------------------------------------------------------------------------------------------------


@given(chains(2))
def test_composition_is_the_matrix_product(chain):
    a, b = chain
    close(a.then(b).dense(), b.dense() @ a.dense())
    close(shares(a.then(b)), shares(b) @ shares(a))


@given(chains(3))
def test_composition_is_associative(chain):
    a, b, c = chain
    left, right = a.then(b).then(c), a.then(b.then(c))
    close(left.dense(), right.dense())
    close(shares(left), shares(right))
    assert torch.equal(left.mask, right.mask)
    if only_real_anchors(chain):
        assert torch.equal(left.anchors * left.mask, right.anchors * right.mask)


@given(chains(2))
def test_applying_a_composition_is_applying_in_turn(chain):
    a, b = chain
    x = features((*a.lead, a.n_in))
    close(a.then(b).apply(x), b.apply(a.apply(x)))


@given(chains(2, of=selections))
def test_composed_selections_stay_bit_exact(chain):
    a, b = chain
    x = features((*a.lead, a.n_in), dtype=torch.bfloat16)
    composed = a.then(b)
    assert composed.is_selection or 0 in (a.n_in, a.n_out)
    assert torch.equal(composed.apply(x), b.apply(a.apply(x)))


@given(chains(2, of=exclusives))
def test_composed_exclusive_maps_stay_exclusive_and_sparse(chain):
    a, b = chain
    composed = a.then(b)
    assert composed.exclusive
    assert composed.n_edges <= max(a.n_in, a.n_out, b.n_out)
    y = features((*b.lead, b.n_out))
    close(composed.unmerge(y), a.unmerge(b.unmerge(y)))


@given(chains(2))
def test_provenance_of_a_composition_is_composed_provenance(chain):
    a, b = chain
    first, second, both = a.provenance(), b.provenance(), a.then(b).provenance()
    assert len(both) == len(first) == math.prod(a.lead)
    for one, two, got in zip(first, second, both, strict=True):
        for pairs, expected_from in zip(got, two, strict=True):
            expected: dict[int, float] = {}
            for middle, outer in expected_from:
                for token, inner in one[middle]:
                    expected[token] = expected.get(token, 0) + outer * inner
            assert dict(pairs) == pytest.approx(expected, abs=1e-5)


@given(chains(2), st.data())
def test_positions_of_a_composition_are_chained_positions(chain, data):
    a, b = chain
    start = tensor(data.draw, a.lead, st.integers(0, 100), a.n_in, torch.int64)
    composed = a.then(b)
    close(composed.positions("mean", start), b.positions("mean", a.positions("mean", start)), 1e-4)
    if not b.kept[~a.mask].any():
        assert torch.equal(composed.positions("first", start), b.positions("first", a.positions("first", start)))
    if only_real_anchors(chain):
        chained = b.positions("anchor", a.positions("anchor", start))
        assert torch.equal(composed.positions("anchor", start), chained * composed.mask)


def test_the_anchor_of_a_composition_is_the_anchors_anchor():
    first = TokenMap.merge(torch.tensor([[0, 0, 1, 1]]), anchor=torch.tensor([[1, 2]]))
    assert first.then(TokenMap.merge(torch.tensor([[0, 0]]), anchor=torch.tensor([[1]]))).anchors.tolist() == [[2]]
    assert first.then(TokenMap.select(torch.tensor([[1, 0]]), 2)).anchors.tolist() == [[2, 1]]
    assert first.then(TokenMap.transform(torch.tensor([[[0.1, 0.9]]]))).anchors.tolist() == [[2]]
    # Also where none is given: group 0 outweighs group 1, though the single token of group 1 outweighs each of its own.
    thirds = TokenMap.merge(torch.tensor([[0, 0, 0, 1]]))
    assert thirds.then(TokenMap.merge(torch.tensor([[0, 0]]), weight=torch.tensor([[2.0, 1]]))).anchors.tolist() == [
        [0]
    ]


@given(any_map())
def test_identity_is_neutral(m):
    same(TokenMap.identity(m.n_in, m.lead).then(m), m)
    same(m.then(TokenMap.identity(m.n_out, m.lead)), m)


# ---- stacks ----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_a_stack_does_what_its_maps_do(data):
    tail = data.draw(st.sampled_from([(), (2,)]))
    parts = [
        data.draw(maps((data.draw(st.integers(1, 2)), *tail), data.draw(st.integers(0, 5))))
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    stacked = TokenMap.stack(parts)
    n_in, n_out = max(m.n_in for m in parts), max(m.n_out for m in parts)
    assert (stacked.n_in, stacked.n_out) == (n_in, n_out)
    start = 0
    for m in parts:
        rows = slice(start, start := start + m.lead[0])
        w = torch.zeros(*m.lead, n_out, n_in)
        w[..., : m.n_out, : m.n_in] = m.dense()
        close(stacked.dense()[rows], w)
        p = torch.zeros(*m.lead, n_out, n_in)
        p[..., : m.n_out, : m.n_in] = shares(m)
        close(shares(stacked)[rows], p)
        assert torch.equal(stacked.mask[rows, ..., : m.n_out], m.mask)
        assert not stacked.mask[rows, ..., m.n_out :].any()
        assert torch.equal((stacked.anchors[rows, ..., : m.n_out] * m.mask), m.anchors * m.mask)
    x = features((start, *tail, n_in))
    close(stacked.apply(x), stacked.dense() @ x)
    same(stacked.then(TokenMap.identity(n_out, stacked.lead)), stacked)


def test_stacked_selections_stay_bit_exact():
    stacked = TokenMap.stack([TokenMap.identity(2), TokenMap.select(torch.tensor([[4, 1, 3]]), 5)])
    x = features((2, 5), dtype=torch.float16)
    assert stacked.is_selection
    expected = torch.stack([torch.cat([x[0, :2], torch.zeros(1, 3).half()]), x[1, [4, 1, 3]]])
    assert torch.equal(stacked.apply(x), expected)


def test_stacks_that_do_not_fit():
    with pytest.raises(ValueError, match="leading dimensions"):
        TokenMap.stack([])
    with pytest.raises(ValueError, match="leading dimensions"):
        TokenMap.stack([TokenMap.identity(3, (1, 2)), TokenMap.identity(3, (1, 3))])


# ---- devices, shapes, emptiness --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_everything_stays_on_the_device(device):
    group = torch.tensor([[0, 0, 1, -1]], device=device)
    share = torch.tensor([[[0.5, 0, 1], [0.5, 1, 0]]], device=device)
    kept = torch.tensor([[True, False, True]], device=device)
    maps = [
        TokenMap.identity(3, device=device),
        TokenMap.keep(kept),
        TokenMap.merge(group, weight=torch.ones(1, 4, device=device), anchor=torch.tensor([[1, 2]], device=device)),
        TokenMap.transform(share, torch.ones(1, 3, device=device)),
    ]
    for m in (*maps, TokenMap.stack(maps), maps[3].then(TokenMap.identity(2, device=device)), maps[0].then(maps[1])):
        x = features((*m.lead, m.n_in)).to(device)
        y = m.apply(x)
        results = [y, m.unmerge(y), m.unmerge(y, x, lift="pinv"), m.sizes(), m.mask, m.kept, m.owner, m.anchors]
        results += [m.positions("first"), m.positions("mean"), m.positions("anchor"), m.dense()]
        assert {t.device.type for t in results} == {device}
        close(y.cpu(), m.to("cpu").apply(x.cpu()))


def test_to_moves_every_tensor():
    m = TokenMap.transform(torch.full((1, 2, 3), 0.5))
    m = TokenMap(m.source, m.target, m.weight, 3, 2, m.share, torch.tensor([[0, 1]]))
    moved = m.to("meta")
    assert {t.device.type for t in (moved.source, moved.target, moved.weight, moved.share, moved.anchor)} == {"meta"}
    same(m.to("cpu"), m)
    assert TokenMap.identity(3).to("meta").share is None


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.apply(torch.zeros(1, 5, 2)),
        lambda m: m.apply(torch.zeros(2, 4, 2)),
        lambda m: m.apply(torch.zeros(4, 2)),
        lambda m: m.unmerge(torch.zeros(1, 4, 2)),
        lambda m: m.unmerge(torch.zeros(2, 3, 2)),
        lambda m: m.unmerge(torch.zeros(1, 4, 2), lift="pinv"),
        lambda m: m.unmerge(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)),
        lambda m: m.sizes(torch.ones(1, 5)),
        lambda m: m.sizes(torch.ones(2, 4)),
        lambda m: m.positions("first", torch.ones(1, 3)),
        lambda m: m.positions("mean", torch.ones(2, 4)),
        lambda m: m.positions("anchor", torch.ones(1, 5)),
        lambda m: m.then(TokenMap.identity(4)),
        lambda m: m.then(TokenMap.identity(3, (2,))),
        lambda m: m.then(TokenMap.identity(3, (1, 1))),
        lambda m: TokenMap.merge(torch.zeros(1, 4, dtype=torch.int64), weight=torch.ones(1, 3)),
        lambda m: TokenMap.merge(torch.zeros(1, 4, dtype=torch.int64), weight=torch.ones(4)),
        lambda m: TokenMap.merge(torch.zeros(1, 4, dtype=torch.int64), anchor=torch.zeros(1, 4, dtype=torch.int64)),
        lambda m: TokenMap.transform(torch.ones(1, 2, 3), torch.ones(1, 2)),
        lambda m: TokenMap(m.source, m.target[..., :2], m.weight, 4, 3),
        lambda m: TokenMap(m.source, m.target, m.weight[0], 4, 3),
        lambda m: TokenMap(m.source, m.target, m.weight, 4, 3, share=torch.ones(1, 4)),
        lambda m: TokenMap(m.source, m.target, m.weight, 4, 3, anchor=torch.zeros(1, 4, dtype=torch.int64)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call):
    m = TokenMap.select(torch.tensor([[3, 1, 0]]), 4)
    with pytest.raises(ValueError, match=r"\(1?,?.*\).*(got|takes)"):
        call(m)


@pytest.mark.parametrize(
    "m",
    [
        TokenMap.identity(0),
        TokenMap.keep(torch.zeros(2, 0, dtype=torch.bool)),
        TokenMap.keep(torch.zeros(2, 4, dtype=torch.bool)),
        TokenMap.select(torch.full((1, 2), -1), 3),
        TokenMap.select(torch.full((1, 2), -1), 0),
        TokenMap.merge(torch.full((1, 3), -1)),
        TokenMap.merge(torch.full((1, 3), -1), n_out=2),
        TokenMap.merge(torch.zeros(1, 0, dtype=torch.int64)),
        TokenMap.merge(torch.zeros(1, 0, dtype=torch.int64), n_out=2),
        TokenMap.transform(torch.zeros(1, 2, 3)),
        TokenMap.transform(torch.zeros(1, 2, 0)),
        TokenMap.transform(torch.zeros(1, 0, 3)),
        TokenMap.stack([TokenMap.identity(0), TokenMap.keep(torch.zeros(1, 0, dtype=torch.bool))]),
    ],
    ids=repr,
)
def test_nothing_in_or_nothing_out(m):
    x = torch.ones(*m.lead, m.n_in, 2)
    y = m.apply(x)
    assert torch.equal(y, torch.zeros(*m.lead, m.n_out, 2))
    for lift in ("copy", "pinv"):
        assert torch.equal(m.unmerge(y, lift=lift), torch.zeros_like(x))
        assert torch.equal(m.unmerge(y, x, lift=lift), x)
    assert m.sizes().tolist() == m.positions("mean").tolist() == torch.zeros(*m.lead, m.n_out).tolist()
    assert (m.positions("first") == 0).all() and (m.positions("anchor") == 0).all()
    assert m.provenance() == [[[] for _ in range(m.n_out)] for _ in range(math.prod(m.lead))]
    same(m.then(TokenMap.identity(m.n_out, m.lead)), m)
    same(TokenMap.identity(m.n_in, m.lead).then(m), m)
    emptied = m.then(TokenMap.keep(torch.zeros(*m.lead, m.n_out, dtype=torch.bool)))
    assert (emptied.n_in, emptied.n_out) == (m.n_in, 0)


@pytest.mark.parametrize(
    "map",
    [
        TokenMap.select(torch.tensor([[0, 2, -1], [1, 2, 4]]), 5),
        TokenMap.merge(torch.tensor([[0, 0, 1, -1, 1], [0, 1, 2, 2, 2]]), 3),
        TokenMap.transform(torch.tensor([[[0.5, 0.2, 0.0], [0.5, 0.8, 1.0]]]).expand(2, -1, -1)),
    ],
)
def test_extending_leaves_the_new_tokens_as_they_are(map):
    longer = map.extend(2)
    assert (longer.n_in, longer.n_out) == (map.n_in + 2, map.n_out + 2)
    for name in ("dense", "dense_share"):
        new = getattr(longer, name)()
        torch.testing.assert_close(new[:, : map.n_out, : map.n_in], getattr(map, name)())
        torch.testing.assert_close(new[:, map.n_out :, map.n_in :], torch.eye(2).expand(2, -1, -1))
        assert new[:, : map.n_out, map.n_in :].sum() == 0 == new[:, map.n_out :, : map.n_in].sum()
    fresh = torch.arange(map.n_in, map.n_in + 2).expand(2, -1)
    assert torch.equal(longer.positions("anchor"), torch.cat([map.positions("anchor"), fresh], -1))
    assert map.extend(0) is map
