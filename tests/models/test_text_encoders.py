"""Reductions inside encoders of text: exact in post-norm layers, and padding counts for nothing."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tokenthrift as tt
from models.encoders import TEXTS, text_encoder, texts
from tokenthrift.core.tokenmap import TokenMap
from tokenthrift.vision.tome import ToMe

close = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def hidden(model, batch):
    return model(**batch).last_hidden_state


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("lengths", [(21, 21), (21, 9)])
def test_no_reduction_is_bit_identical(name, attention, lengths):
    model, batch = text_encoder(name, attention), texts(*lengths)
    dense = hidden(model, batch)
    with tt.apply("vision=tome(r=0)", model) as session:
        assert torch.equal(hidden(model, batch), dense)
    assert session.provenance()["vision"].is_identity
    assert torch.equal(hidden(model, batch), dense)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("plan", ["tome(r=3)", "tome(keep=0.5)", "tome(r=2, prop_attn=False)"])
def test_a_padded_text_is_reduced_as_if_it_were_alone(name, attention, plan):
    model, batch = text_encoder(name, attention), texts(21, 9, 14, 9)
    with tt.apply(f"vision={plan}", model) as session:
        together = model(**batch)
        left = session.provenance()["vision"].mask.sum(-1)
        for i, length in enumerate((21, 9, 14, 9)):
            alone = model(**{k: v[i : i + 1, :length] for k, v in batch.items()})
            torch.testing.assert_close(together.last_hidden_state[i, :length], alone.last_hidden_state[0], **close)
            if "pooler_output" in together and together.pooler_output is not None:
                torch.testing.assert_close(together.pooler_output[i], alone.pooler_output[0], **close)
            assert session.provenance()["vision"].n_out == left[i] < length
    assert (hidden(model, batch)[0] - together.last_hidden_state[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["bert", "distilbert"])
@pytest.mark.parametrize("method", [ToMe(r=4), ToMe(r=[0, 5, 3], prop_attn=False)], ids=str)
def test_equals_the_merged_post_norm_layer_written_out(name, method):
    model, batch = text_encoder(name), texts(21, 21)
    h = model.embeddings(batch["input_ids"])
    layers = model.encoder.layer if name == "bert" else model.transformer.layer
    sizes, maps, ends = torch.ones(2, 21), [], torch.arange(21).expand(2, 21) == 20
    for i, layer in enumerate(layers):
        own = layer.attention.self if name == "bert" else layer.attention
        q, k, v = (
            getattr(own, p)(h).unflatten(-1, (2, 12)).transpose(1, 2)
            for p in (("query", "key", "value") if name == "bert" else ("q_lin", "k_lin", "v_lin"))
        )
        scores = q @ k.transpose(-1, -2) / 12**0.5
        mixed = (scores + sizes.log()[:, None, None] if method.prop_attn else scores).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).flatten(2)
        h = layer.attention.output(mixed, h) if name == "bert" else layer.sa_layer_norm(own.out_lin(mixed) + h)
        view = tt.View(
            features=h, keys=k, sizes=sizes, protected=(torch.arange(h.shape[1]) < 1).expand(h.shape[:2]) | ends,
            prefix=1, grid=(1, 1, 20), tokens=21, layer=i, layers=3,
        )  # fmt: skip
        map = method.reduce(view)
        if map is not None:
            h, sizes, ends = map.apply(h), map.sizes(sizes), map.apply(ends.float()[..., None])[..., 0] > 0
            maps.append(map)
        h = layer.feed_forward_chunk(h) if name == "bert" else layer.output_layer_norm(layer.ffn(h) + h)
    for map in reversed(maps):
        h = map.unmerge(h)
    with tt.apply(tt.Plan(vision=method), model):
        torch.testing.assert_close(hidden(model, batch), h, **close)


def test_clip_reads_the_text_off_its_last_token_and_sees_no_future():
    model, batch = text_encoder("clip-text"), texts(17, 17)
    with tt.apply("vision=tome(r=3)", model) as session:
        before = model(**batch)
        map = session.provenance()["vision"]
        assert (map.sizes().gather(1, map.owner[:, -1:]) == 1).all()  # EOS stays alone
        torch.testing.assert_close(before.pooler_output, before.last_hidden_state[:, -1], **close)

    kept = KeepSome()
    with tt.apply(tt.Plan(vision=kept), model):  # pruning is causal: a later token changes no earlier one
        first = hidden(model, batch)
        batch["input_ids"][:, 12] = 7
        second = hidden(model, batch)
    assert torch.equal(first[:, :12], second[:, :12]) and not torch.equal(first[:, 12:], second[:, 12:])


@tt.method("_keep_some", stage="vision", paper="(a test)", needs=("features", "tokens"))
class KeepSome:
    def reduce(self, view):
        n = view.features.shape[1]
        keep = torch.arange(n) % 3 != 1
        return TokenMap.keep(keep.expand(view.features.shape[0], n)) if view.layer == 0 else None


def test_flops_are_those_that_torch_counts():
    model, batch = text_encoder("bert", "eager"), texts(21, 21)
    pooling = 2 * 2 * 24 * 24
    with tt.apply("vision=tome(r=4)", model) as session, FlopCounterMode(display=False) as counted:
        hidden(model, batch)
    matching = sum(2 * 2 * ((n + 1) // 2) * (n // 2) * 12 for n in (21, 17, 13))
    assert session.report().flops == counted.get_total_flops() - pooling - matching
    with FlopCounterMode(display=False) as counted:
        hidden(model, batch)
    assert session.report().flops_dense == counted.get_total_flops() - pooling


def test_records_count_no_padding():
    model = text_encoder("bert")
    with tt.apply("vision=tome(keep=0.5)", model) as session:
        hidden(model, texts(21, 11))
    record = session.report().stages["vision"]
    assert (record.tokens_before, record.tokens_after) == (32, 11 + 6)
