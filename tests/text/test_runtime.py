"""Methods in sequence, what they load, what the result says; reading files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tokenthrift.core.errors import ThriftError
from tokenthrift.core.plan import Plan
from tokenthrift.core.view import Lazy
from tokenthrift.text.files import decode_text, read_text
from tokenthrift.text.runtime import compress_text
from tokenthrift.text.spans import join, map_to_spans, spans_to_map
from tokenthrift.text.truncate import Truncate

from .tiny import PROSE, HashingEmbedder, scorer, tokenizer


def test_methods_in_sequence_compose() -> None:
    plan = Plan.parse("text=embedding_sentences(rate=0.6) text=truncate(rate=0.5, where=tail)")
    out = compress_text(plan.at("text"), PROSE, "the keys", tokenizer(), embedder=HashingEmbedder())
    first = compress_text(plan.at("text")[:1], PROSE, "the keys", tokenizer(), embedder=HashingEmbedder())
    second = compress_text(plan.at("text")[1:], first.text, None, tokenizer())
    assert out.text == second.text == join(PROSE, out.kept)
    assert map_to_spans(out.map) == out.kept
    assert out.method == "text=embedding_sentences(rate=0.6) text=truncate(where='tail')"
    assert out.tokens_after < first.tokens_after < out.tokens_before


def test_no_methods_leave_the_text() -> None:
    for text in (PROSE, ""):
        out = compress_text([], text, None, tokenizer())
        assert (out.text, out.rate, out.method) == (text, 1.0, "")


def test_models_load_only_if_a_method_needs_them() -> None:
    def never() -> Any:
        raise AssertionError("loaded")

    compress_text([Truncate()], PROSE, None, tokenizer(), Lazy(never), Lazy(never))
    with pytest.raises(AssertionError, match="loaded"):
        compress_text(Plan.parse("selective_context").at("text"), PROSE, None, tokenizer(), Lazy(never))


def test_html_shows_the_original_escaped() -> None:
    text = "<b>one</b> & two three"
    out = compress_text([Truncate(rate=0.5, where="tail")], text, None, tokenizer())
    shown = out.html()
    assert "<b>" not in shown
    assert shown.startswith("<div") and shown.endswith("</div>")
    assert "<del>&lt;b&gt;" in shown
    assert out.html(page=True).startswith("<!doctype html>")
    assert shown in out.html(page=True)
    assert json.loads(json.dumps(out.to_dict()))["text"] == out.text


def test_html_of_kept_spans_out_of_order() -> None:
    class Swap:
        info = Truncate.info
        rate, where = 0.5, "head"

        def reduce(self, view: Any) -> Any:
            return spans_to_map([(4, 6), (0, 2)], len(view.text))

    out = compress_text([Swap()], "ab cdef", None, tokenizer())
    assert out.text == "deab"
    assert out.html().count("<del>") == 2


def test_a_text_is_a_str() -> None:
    with pytest.raises(ThriftError, match="not bytes"):
        compress_text([], b"text", None, tokenizer())  # type: ignore[arg-type]


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ThriftError, match="Slow does not give character offsets"):
        compress_text([Truncate()], PROSE, None, Slow())


def test_read_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffÄ 日\r\nb".encode())
    assert read_text(file) == "Ä 日\r\nb"
    for data, said in [(b"", "empty"), (b" \n", "empty"), (b"a\0b", "binary"), (b"a\xff", "not UTF-8 text .byte 1")]:
        with pytest.raises(ThriftError, match=said):
            decode_text(data, "standard input")
    with pytest.raises(ThriftError, match="no file"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(ThriftError, match="folder"):
        read_text(tmp_path)
    with pytest.raises(ThriftError):
        read_text("a\0b")


def test_a_session_compresses_with_its_own_model() -> None:
    from tokenthrift import apply

    from .tiny import language_model

    with apply("text=selective_context(rate=0.5)", language_model(), tokenizer()) as session:
        out = session.compress(PROSE)
    assert 0 < out.tokens_after <= out.tokens_before / 2 + 1
    assert out.kept == compress_text(session.plan.at("text"), PROSE, None, tokenizer(), scorer()).kept
    assert session.report().stages["text"].tokens_after == out.tokens_after
    assert session.provenance()["text"].n_in == len(PROSE)
    with pytest.raises(ThriftError, match="processor=tokenizer"):
        apply("text=truncate", language_model()).compress(PROSE)


def test_compress_takes_models_as_they_are() -> None:
    from tokenthrift import compress

    out = compress(PROSE, "selective_context", 0.5, scorer=(scorer().model, tokenizer()), level="sentence")
    assert out.method == "text=selective_context(level='sentence')"
    with pytest.raises(ThriftError, match="unknown method 'truncat' at stage text: did you mean 'truncate'"):
        compress(PROSE, "truncat", scorer=scorer())
    with pytest.raises(ThriftError, match="no parameter 'wher'"):
        compress(PROSE, "truncate", wher="head", scorer=scorer())


@pytest.mark.packs
def test_the_right_sentence_for_a_question() -> None:
    from tokenthrift import compress

    out = compress(PROSE, "embedding_sentences", rate=0.3, question="Who can open the front door for me?")
    assert "porter" in out.text
    out = compress(PROSE, "embedding_sentences", rate=0.3, question="How much did he pay for the apartment?")
    assert "$412.50" in out.text
