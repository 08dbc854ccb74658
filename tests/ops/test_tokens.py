"""Token spans leave no gap, whatever the tokenizer skips or splits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokenthrift.core.errors import ThriftError
from tokenthrift.ops.tokens import count_tokens, encode, token_spans

from ..text.tiny import tokenizer


def word_level() -> PreTrainedTokenizerFast:
    """Like BERT's it skips white space, so its offsets have gaps."""
    inner = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")


@pytest.mark.parametrize("make", [tokenizer, word_level])
@given(text=st.text(st.sampled_from("ab .\n日🙂é"), max_size=30))
def test_the_spans_cover_the_text(make: object, text: str) -> None:
    made = make()  # type: ignore[operator]
    spans = token_spans(made, text)
    assert len(spans) == count_tokens(made, text)
    if spans:
        assert {i for a, b in spans for i in range(a, b)} == set(range(len(text)))
        assert spans == sorted(spans, key=lambda s: s[1])


def test_skipped_white_space_belongs_to_the_token_after_it() -> None:
    assert token_spans(word_level(), "  a  b ") == [(0, 3), (3, 7)]


def test_the_tokens_of_one_character_overlap() -> None:
    spans = token_spans(tokenizer(), "a🙂")
    assert spans[0] == (0, 1)
    assert set(spans[1:]) == {(1, 2)}
    assert len(spans) == 5


def test_nothing() -> None:
    assert encode(tokenizer(), []) == []
    assert token_spans(tokenizer(), "") == []
    assert count_tokens(tokenizer(), "") == 0


def test_a_tokenizer_without_offsets() -> None:
    with pytest.raises(ThriftError, match="fast tokenizer"):
        encode(object(), ["a"])
