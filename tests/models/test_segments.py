"""Groups of the pieces of one identifier, by the marks of three kinds of tokenizers."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokenthrift.models.segments import IdentifierSegments, identifier_groups


def joined(text, style=None):
    """The groups of several tokens; spaces stand between tokens."""
    tokens = text.split()
    groups = identifier_groups(tokens, style)
    assert groups == sorted(groups) and set(groups) == set(range(len(set(groups))))
    members = [[t for t, g in zip(tokens, groups, strict=True) if g == group] for group in dict.fromkeys(groups)]
    return [m for m in members if len(m) > 1]


def test_byte_level_pieces():
    text = "<s> def Ġget _ user Name ( self ) : Ċ ĠĠĠ Ġreturn Ġself . user Name </s> <pad>"
    assert joined(text) == [["Ġget", "_", "user", "Name"], ["user", "Name"]]


def test_wordpiece_pieces():
    assert joined("[CLS] token ##iz ##er . from _ pre ##train ##ed [SEP]") == [
        ["token", "##iz", "##er"],
        ["pre", "##train", "##ed"],
    ]


def test_sentencepiece_pieces():
    assert joined("<s> ▁def ▁is Ready ( ) ▁ été s ▁x <0x0A> y") == [["▁is", "Ready"], ["été", "s"]]


def test_numbers_stay_in_pieces_and_names_may_end_in_digits():
    assert joined("Ġ0 x 1 F Ġx 1 2 Ġ+ Ġ3 4") == [["Ġx", "1", "2"]]


def test_letters_beyond_ascii():
    assert joined("Ġgr Ã¶ ÃŁ e Ġ= Ġ5") == [["Ġgr", "Ã¶", "ÃŁ", "e"]]  # größe


def test_pieces_with_other_characters_join_nothing():
    assert joined("Ġa . b ._ c Ġ(' d ')", "bytes") == []


def test_no_tokens_and_a_text_without_marks():
    assert identifier_groups([]) == []
    assert identifier_groups(["user", "Name"], "bytes") == [0, 0]
    assert identifier_groups(["user", "Name"], "wordpiece") == [0, 1]


@pytest.mark.parametrize(
    ("words", "row"),
    [
        (["[UNK]", "[PAD]", "token", "##iz", "##er", "."], [1, 2, 3, 4, 5, 2, 0, 4]),
        (["[UNK]", "[PAD]", "Ġtoken", "iz", "er", "Ġ."], [1, 2, 3, 4, 5, 2, 0, 4]),
    ],
)
def test_batches_of_ids_are_grouped_as_their_tokens(words, row):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    ids = torch.tensor([row, row[::-1]])
    groups = IdentifierSegments.of(tokenizer)(ids)
    assert groups.dtype == torch.int64
    assert groups.tolist() == [identifier_groups(tokenizer.convert_ids_to_tokens(r.tolist())) for r in ids]
    assert groups[0].tolist()[:6] == [0, 1, 1, 1, 2, 3]
