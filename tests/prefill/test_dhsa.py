"""DHSA: the authors' choices; block by block it is attention under a mask; nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicLayer

import tokenthrift as tt
import tokenthrift.models.prefill_stage as stage
import tokenthrift.prefill.dhsa as dhsa
from tiny_models import fingerprint, generate, prompt, tiny
from tokenthrift.ops.chunk_attention import attend_reads, chunk_vectors, even_edges, similarity_edges, take_best

GOLDEN = Path(__file__).parents[1] / "golden" / "prefill"
MASKS = np.load(GOLDEN / "dhsa_masks.npz")
FAMILY = pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
BOTH = pytest.mark.parametrize("attention", ["sdpa", "eager"])
PLANS = {
    "chunks": "prefill=dhsa(budget=24, block=6, chunk=5, sinks=4, local=8, window=2, spacing=2)",
    "a_shape": "prefill=dhsa(budget=24, block=6, chunk=4, pattern=a_shape)",
    "vertical_slash": "prefill=dhsa(budget=24, block=6, chunk=4, pattern=vertical_slash)",
}
PATTERN = pytest.mark.parametrize("pattern", PLANS)


def method_of(plan):
    return tt.Plan.parse(plan).at("prefill")[0]


def read_by(reads, n):
    """``(heads, blocks, n)`` bool."""
    rows = [reads.of_block(i) for i in range(len(reads.blocks) - 1)]
    return torch.stack([torch.nn.functional.pad(row, (0, n - row.shape[-1])) for row in rows], dim=1)


# ---- the authors' choices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize(("pattern", "name"), [("a_shape", "a_shape"), ("vertical_slash", "vs_blockwise")])
def test_blocks_equal_the_authors_masks(pattern, name, row):
    q, k = (torch.tensor(MASKS[x][row : row + 1]) for x in "qk")
    reads = method_of(f"dhsa(budget=40, block=16, chunk=8, pattern={pattern})").select(tt.View(queries=q, keys=k))
    read = read_by(reads, 96).view(3, 6, 12, 8)
    assert torch.equal(read.any(-1), read.all(-1)), "chunks are read whole"
    np.testing.assert_array_equal(read.any(-1), MASKS[name][row])


@pytest.mark.parametrize("row", [0, 1])
def test_best_chunks_equal_the_authors_plain_mask(row):
    q, k = (torch.tensor(MASKS[x][row]) for x in "qk")
    blocks, chunks = even_edges(96, 16), even_edges(96, 8)
    scores = chunk_vectors(q, blocks) @ chunk_vectors(k, chunks).mT
    taken = take_best(scores, chunks.diff().expand(6, -1), torch.full((6,), 3 * 8))
    np.testing.assert_array_equal(taken > 0, MASKS["plain"][row])
    assert set(taken.unique().tolist()) == {0, 8}


@pytest.mark.parametrize("row", [0, 1])
def test_tokens_of_given_chunks_equal_the_authors_first_code(row, monkeypatch):
    """Which tokens of the chunk that is cut are read is arbitrary there: as many of each chunk are."""
    data = np.load(GOLDEN / "dhsa_chunks.npz")
    q, k = (torch.tensor(data[x][row : row + 1]) for x in "qk")
    edges = torch.tensor(data["edges"][row])
    monkeypatch.setattr(dhsa, "similarity_edges", lambda *_: edges)
    plan = f"dhsa(budget={data['budget']}, block={data['block']}, local={data['local']}, sinks=0)"
    read = read_by(method_of(plan).select(tt.View(queries=q, keys=k)), 160)[0]
    last = len(read) - 1  # it is dense: the authors leave the question out of this function
    token = torch.arange(160)[:, None]
    of_chunk = (token >= edges[:-1]) & (token < edges[1:])
    want = torch.tensor(data["read"][row])
    assert torch.equal(read[:last].float() @ of_chunk.float(), want[:last].float() @ of_chunk.float())
    assert (want[last - 1].float() @ of_chunk.float() % edges.diff() > 0).any(), "some chunk is cut"


# ---- its parts ------------------------------------------------------------------------------------------------------


def test_chunks_end_where_the_text_turns():
    generator = torch.Generator().manual_seed(0)
    lengths = [13, 30, 11, 26]
    topic = torch.randn(4, 2, 8, generator=generator).repeat_interleave(torch.tensor(lengths), dim=0)
    keys = (topic + 0.1 * torch.randn(topic.shape, generator=generator)).transpose(0, 1)
    assert similarity_edges(keys, 4, window=4, spacing=8).tolist() == [0, 13, 43, 54, 80]
    many = similarity_edges(keys, 40, window=4, spacing=8)
    assert many[1:-1].diff().min() > 8
    assert 5 < len(many) <= 10
    assert similarity_edges(keys[:, :7], 4, window=4, spacing=8).tolist() == [0, 7], "too short to compare"
    assert similarity_edges(keys, 1, window=4, spacing=8).tolist() == [0, 80]


def test_long_chunks_of_noise_weigh_no_more_than_short_ones():
    x = torch.randn(1, 4000, 16, generator=torch.Generator().manual_seed(0))
    edges = torch.tensor([0, *range(10, 1000, 10), *range(1000, 4001, 100)])
    squares = chunk_vectors(x, edges).square().mean(-1)[0]
    assert squares[:100].mean() == pytest.approx(float(squares[100:].mean()), rel=0.2)


def test_the_last_chunk_is_cut_and_never_more_is_taken_than_there_is():
    scores = torch.tensor([[[1.0, 3.0, 2.0, 9.0]] * 3])
    sizes = torch.tensor([[5, 4, 6, 0]] * 3)
    taken = take_best(scores, sizes, torch.tensor([7, 100, 0]))
    assert taken.tolist() == [[[0, 4, 3, 0], [5, 4, 6, 0], [0, 0, 0, 0]]]


# ---- in a model -----------------------------------------------------------------------------------------------------


@FAMILY
@BOTH
@PATTERN
def test_attention_is_dense_attention_under_the_mask(family, attention, pattern, monkeypatch):
    """Grouped queries and left padding; the cache holds all tokens, layers with a window are left alone."""
    model, inputs, calls = tiny(family, attention), prompt(length=50, pad=7), []

    def spy(q, k, v, reads, scaling):
        out = attend_reads(q, k, v, reads, scaling)
        calls.append((q, k, v, reads, scaling, out))
        return out

    monkeypatch.setattr(stage, "attend_reads", spy)
    with tt.apply(PLANS[pattern], model) as session, torch.no_grad():
        out = model(**inputs, use_cache=True)
    full = 1 if family == "gemma3_text" else 2
    assert len(calls) == 2 * full  # a call a row and layer
    shares = []
    for q, k, v, reads, scaling, (got, share) in calls:
        n, groups = q.shape[1], len(q) // len(k)
        assert n in (43, 50)
        blocks = read_by(reads, n)
        of_query = torch.searchsorted(reads.blocks, torch.arange(n), right=True) - 1
        allowed = blocks[:, of_query] & torch.ones(n, n, dtype=torch.bool).tril()
        assert allowed.any(-1).all(), "every query reads something"
        assert allowed[:, -6:].sum() == len(allowed) * sum(range(n - 5, n + 1)) or pattern == "a_shape"
        logits = q @ k.repeat_interleave(groups, 0).mT * scaling
        want = logits.masked_fill(~allowed, -torch.inf).softmax(-1) @ v.repeat_interleave(groups, 0)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        sizes, ends = reads.blocks.diff(), reads.blocks[1:]
        shares.append(float((blocks.float().mean(0).sum(-1) * sizes).sum() / (sizes * ends).sum()))
        assert share == pytest.approx(shares[-1], rel=0.02)
        late = (reads.recent > 0).nonzero().flatten()
        assert len(late) >= 2
        assert blocks[:, late].sum(-1).max() <= 24 + (6 if pattern == "vertical_slash" else 0)
    record = session.report().stages["prefill"]
    assert record.calls == full
    assert 0.3 < record.kept < 0.9
    assert session.flops < session.flops_dense
    assert out.past_key_values.get_seq_length() == 50
    assert isinstance(out.past_key_values.layers[1], DynamicLayer)


@FAMILY
@BOTH
def test_reading_everything_is_bit_identical_and_leaves_no_trace(family, attention):
    model, inputs = tiny(family, attention), prompt(length=50, pad=5)
    tokens, logits, before = generate(model, inputs, 3), model(**inputs).logits, fingerprint(model)
    for plan in (
        "dhsa(budget=1.0)",
        "dhsa(budget=300)",
        "dhsa()",
        "dhsa(budget=50, block=6, chunk=4, pattern=a_shape)",
    ):
        with tt.apply(plan, model) as session:
            assert torch.equal(generate(model, inputs, 3), tokens)
            assert torch.equal(model(**inputs).logits, logits)
            assert session.report().stages["prefill"].kept == 1
    with tt.apply(PLANS["chunks"], model):
        assert not torch.equal(model(**inputs, logits_to_keep=1).logits, logits[:, -1:])
    assert fingerprint(model) == before
    assert torch.equal(model(**inputs).logits, logits)


@PATTERN
@pytest.mark.parametrize("pad", [13, 33])
def test_a_padded_row_generates_what_it_generates_alone(pattern, pad):
    """With 33 of 50 the row is dense, beside one that is not."""
    model, inputs = tiny("llama"), prompt(length=50, pad=pad)
    with tt.apply(PLANS[pattern], model):
        out = generate(model, inputs)
        for row, padding in enumerate((pad, 0)):
            alone = generate(model, {k: v[row : row + 1, padding:] for k, v in inputs.items()})
            assert torch.equal(out[row, padding:], alone[0])


def test_it_goes_with_the_cache_and_the_decode_stage():
    model, inputs = tiny("llama"), prompt(length=50, pad=9)
    with tt.apply(f"{PLANS['chunks']} cache=snapkv(budget=12, window=4) decode=prompt_lookup()", model) as session:
        drafted = generate(model, inputs, 12)
    with tt.apply(f"{PLANS['chunks']} cache=snapkv(budget=12, window=4)", model):
        assert torch.equal(generate(model, inputs, 12), drafted)
    assert session.report().stages["cache"].kept < 0.5
    assert session.report().stages["prefill"].calls == 2


def test_later_forwards_are_dense():
    model, inputs = tiny("llama"), prompt(batch=1, length=50)
    more = prompt(batch=1, length=30, seed=1)["input_ids"]
    with tt.apply(PLANS["chunks"], model) as session:
        held = model(**inputs, use_cache=True).past_key_values
        model(more, past_key_values=held)
    assert session.report().stages["prefill"].calls == 2  # one a layer, of the prompt


def test_no_more_is_computed_than_a_block_of_queries_reads(monkeypatch):
    """Attention over 400 tokens in blocks of 8 that read 24 keys: no matrix of all queries and keys exists."""
    made = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, mask=None, **kwargs):
        made.append(query.shape[-2] * key.shape[-2])
        return real(query, key, value, mask, **kwargs)

    monkeypatch.setattr("tokenthrift.ops.chunk_attention.scaled_dot_product_attention", spy)
    q, k = (torch.randn(1, heads, 400, 8, generator=torch.Generator().manual_seed(heads)) for heads in (6, 2))
    for pattern in PLANS:
        made.clear()
        reads = method_of(PLANS[pattern].replace("block=6", "block=8")).select(tt.View(queries=q, keys=k))
        _, share = attend_reads(q[0], k[0], k[0], reads, 1.0)
        assert sum(made) < 0.2 * 400**2
        assert share < 0.25


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("budget=0", "keeps nothing"),
        ("budget=1.5", "outside"),
        ("budget=256", "reads 256 tokens in any case"),
        ("budget=64, pattern=a_shape", "reads 64 tokens in any case"),
        ("budget=96, pattern=vertical_slash", "reads 96 tokens in any case"),
        ("block=0", "at least 1"),
        ("chunk=0", "at least 1"),
        ("window=0", "at least 1"),
        ("sinks=-1", "at least 0"),
        ("spacing=-1", "at least 0"),
        ("local=32", "less than block"),
        ("pattern=stripes", "knows the patterns"),
    ],
)
def test_impossible_parameters_are_refused_in_one_line(wrong, words):
    with pytest.raises(tt.ThriftError, match=words) as error:
        tt.Plan.parse(f"dhsa({wrong})")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gemma2", {"attn_logit_softcapping": 50.0}, "caps its scores"),
        ("mistral", {"sliding_window": 16}, "every layer .* has a window"),
    ],
)
def test_models_it_cannot_act_on_are_refused(family, changes, words):
    model = tiny(family, "eager", **changes)
    before = fingerprint(model)
    with pytest.raises(tt.ThriftError, match=words), tt.apply("dhsa()", model):
        pass
    assert fingerprint(model) == before
