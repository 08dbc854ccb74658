"""Merging the pieces of identifiers inside text encoders, end to end."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

import tokenthrift as tt
from models.encoders import text_encoder
from tokenthrift.models.segments import identifier_groups
from tokenthrift.ops.segments import segment_pool

VOCABULARY = ["[UNK]", "[PAD]", "<x>", "[SEP]", "[CLS]", "token", "##iz", "##er", ".", "=", "pre", "##train", "for"]
TEXT = ["[CLS]", "token", "##iz", "##er", ".", "pre", "##train", "=", "for", "[SEP]"]
SHORT = ["[CLS]", "pre", "##train", ".", "for", "[SEP]"]


@pytest.fixture(autouse=True)
def _quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def tokenizer():
    words = {word: i for i, word in enumerate(VOCABULARY)}
    made = Tokenizer(tokenizer_models.WordLevel(words, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def batch(*rows):
    longest = max(map(len, rows))
    padded = [[*row, *["[PAD]"] * (longest - len(row))] for row in rows]
    ids = torch.tensor([[VOCABULARY.index(word) for word in row] for row in padded])
    return {"input_ids": ids, "attention_mask": (ids != 1).long()}


def hidden(model, inputs):
    return model(**inputs).last_hidden_state


@pytest.mark.parametrize(
    "call",
    [
        "subtokens()",
        "subtokens(prop_attn=True)",
        "subtokens(at=2, mode=attention)",
    ],
)
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_identifiers_become_one_token(name, call, tokenizer):
    model = text_encoder(name)
    dense = hidden(model, batch(TEXT, SHORT))
    with tt.apply(call, model, processor=tokenizer) as session:
        together = hidden(model, batch(TEXT, SHORT))
        map = session.provenance()["vision"]
        assert map.mask.sum(-1).tolist() == [7, 5]
        assert torch.equal(together[0, 1], together[0, 3]) and torch.equal(together[1, 1], together[1, 2])
        torch.testing.assert_close(together[1:, :6], hidden(model, batch(SHORT)), rtol=1e-5, atol=1e-5)
        plain = batch(["[CLS]", "token", ".", "for", "[SEP]"])
        merged = hidden(model, plain)
    assert (together - dense).abs().max() > 1e-3
    assert torch.equal(hidden(model, plain), merged)  # nothing in pieces: nothing changes


def test_embeddings_are_pooled_before_the_first_layer(tokenizer):
    model, inputs, seen = text_encoder("bert"), batch(TEXT), []
    with tt.apply("subtokens()", model, processor=tokenizer):
        model.encoder.layer[0].attention.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        hidden(model, inputs)
    groups = torch.tensor([identifier_groups(TEXT)])
    torch.testing.assert_close(seen[0], segment_pool(model.embeddings(inputs["input_ids"]), groups))


def test_the_tokenizer_is_asked_for():
    model = text_encoder("bert")
    with pytest.raises(tt.ThriftError, match="processor=tokenizer"), tt.apply("subtokens()", model):
        hidden(model, batch(TEXT))
