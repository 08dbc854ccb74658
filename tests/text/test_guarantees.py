"""What `tokenthrift.compress` promises beside the method: targets, checks, skipping, lists, chunks, async."""

from __future__ import annotations

import asyncio
import html
import json
import math
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

import tokenthrift as tt
from tokenthrift.core.errors import ThriftError
from tokenthrift.core.view import View
from tokenthrift.ops.tokens import Span, TiktokenTokenizer, as_tokenizer, count_tokens, token_spans
from tokenthrift.text.protect import Protection
from tokenthrift.text.runtime import chunks_of, compress_text
from tokenthrift.text.selective_context import SelectiveContext
from tokenthrift.text.spans import join, spans_to_map
from tokenthrift.text.targets import budget_of
from tokenthrift.text.truncate import Truncate

from .tiny import PROSE, HashingEmbedder, scorer, tokenizer

DEFAULT = Protection.of("default")


def compress(text: Any = PROSE, method: str = "selective_context", *args: Any, **kwargs: Any) -> Any:
    return tt.compress(text, method, *args, **{"scorer": scorer(), "embedder": HashingEmbedder(), **kwargs})


class Keeps:
    """A method that keeps what it is told to."""

    info = Truncate.info
    rate, where = 0.5, "head"

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans

    def reduce(self, view: View) -> Any:
        return spans_to_map(self.spans, len(view.text))


# ---- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "tokens"),
    [({"rate": 0.7}, 0.7), ({"rate": 90}, 90), ({"tokens": 90}, 90), ({"price": 2.5, "spend": 0.000225}, 90)],
)
def test_targets(target: dict[str, Any], tokens: float) -> None:
    out = compress(**target, protect="none")
    asked = tokens if isinstance(tokens, int) else int(out.tokens_before * tokens + 0.5)
    assert asked - 3 <= out.tokens_after <= asked
    assert out.method == f"text=selective_context(rate={tokens})"


def test_money_is_exact() -> None:
    assert budget_of(price=3, spend=0.3) == 100_000
    assert budget_of(price=1e6, spend=2.9999) == 2
    assert budget_of() is None


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"rate": 0.0}, "outside"),
        ({"rate": 0}, "keeps nothing"),
        ({"rate": math.nan}, "outside"),
        ({"rate": "half"}, "not a budget"),
        ({"tokens": 0}, "no number of tokens"),
        ({"tokens": 1.5}, "no number of tokens"),
        ({"rate": 0.5, "tokens": 9}, "rate and tokens are two targets"),
        ({"price": 3}, "needs both"),
        ({"price": 0, "spend": 1}, "price=0 is no amount"),
        ({"price": 1, "spend": math.nan}, "spend=nan is no amount"),
        ({"price": 10, "spend": 1e-9}, "buys no token"),
        ({"min_saving": -1}, "no saving"),
        ({"min_saving": math.nan}, "no saving"),
        ({"min_saving": 1.5}, "no saving"),
        ({"max_loss": 2}, "outside"),
        ({"max_loss": math.nan}, "outside"),
        ({"chunk": 0}, "no number of tokens"),
        ({"protect": "jsn"}, "did you mean 'json'"),
        ({"tokenizer": 3}, "int counts no tokens"),
        ({"tokenizer": "no/such/folder"}, "cannot load the tokenizer"),
    ],
)
def test_targets_and_limits_that_are_none(target: dict[str, Any], said: str) -> None:
    with pytest.raises(ThriftError, match=said) as error:
        compress(**target)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"), [(b"\xff", "decode them first"), (None, "not NoneType"), ("ab\ud800", "half of a character at 2")]
)
def test_texts_that_are_none(text: Any, said: str) -> None:
    with pytest.raises(ThriftError, match=said):
        compress(text)


# ---- what is checked ------------------------------------------------------------------------------------------------


def test_what_a_method_drops_of_the_protected_is_added() -> None:
    out = compress_text([Keeps([(0, 8)])], PROSE, None, tokenizer(), protect=Protection.of("url"))
    assert out.text == "Mr. Hale https://example.org/a?b=1"
    assert out.notes == ("1 protected spans were added to what the method kept",)
    assert join(PROSE, out.kept) == out.text and out.map.n_out == len(out.text)
    assert out.tokens_after == count_tokens(tokenizer(), out.text)
    assert out.predicted_loss is None  # no scores, no prediction
    plain = compress_text([Keeps([(0, 8)])], PROSE, None, tokenizer())
    assert (plain.text, plain.notes) == ("Mr. Hale", ())


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([], "the method kept nothing"),
        ([(40, 41), (44, 46), (40, 41)], "repeats parts"),
        ([(40, 50), (0, 9)], "did not survive"),
    ],
)
def test_what_cannot_be_mended_is_returned_as_it_was(spans: list[Span], said: str) -> None:
    out = compress_text([Keeps(spans)], PROSE, None, tokenizer(), protect=DEFAULT)
    assert (out.text, out.kept, out.rate) == (PROSE, [(0, len(PROSE))], 1.0)
    assert said in out.notes[-1] and "returned as it was" in out.notes[-1]


def test_another_order_is_said() -> None:
    out = compress_text([Keeps([(40, 50), (0, 9)])], PROSE, None, tokenizer(), protect=Protection())
    assert out.text == PROSE[40:50] + PROSE[:9]
    assert out.notes == ("the method changed the order of the text",)


def test_only_protected_content_is_returned_unchanged() -> None:
    text = json.dumps({"a": list(range(30)), "b": "x"})
    for method in ("selective_context", "truncate", "embedding_sentences"):
        out = compress(text, method, 0.3)
        assert out.text == text
    assert compress(text, rate=0.3).notes == ("all of the text is protected: it is returned unchanged",)


def test_protected_content_over_the_target_wins() -> None:
    text = "Look at https://example.org/one/two/three?x=1 and at `code = 5` for the rest of the story."
    out = compress(text, rate=2)
    assert out.text == " https://example.org/one/two/three?x=1 `code = 5`"
    assert "more than the 2 asked for: only they are kept" in out.notes[0]


def test_a_target_that_was_missed_is_said() -> None:
    text = "One sentence that nobody can divide, whatever the rate"
    out = compress(text, "embedding_sentences", 0.3)
    assert out.text == text
    assert out.notes[0].startswith(f"{out.tokens_before} tokens are left, more than the")
    assert compress(rate=0.5).notes == compress(rate=1.0).notes == ()


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_prompt(text: str) -> None:
    out = compress(text)
    assert (out.text, out.rate) == (text, 1.0)
    assert "nothing in the text" in out.notes[0]


def test_in_a_sequence_the_first_text_counts() -> None:
    steps = [SelectiveContext(rate=0.8), Truncate(rate=0.7)]
    out = compress_text(steps, PROSE, None, tokenizer(), scorer(), protect=Protection.of("structure"))
    assert "https://example.org/a?b=1" in out.text
    assert out.notes == ()
    single = compress_text(steps[:1], PROSE, None, tokenizer(), scorer(), protect=Protection.of("structure"))
    assert 0 < single.predicted_loss < out.predicted_loss < 1  # type: ignore[operator]


# ---- when it does not pay -------------------------------------------------------------------------------------------


def test_nothing_is_run_that_cannot_save_enough() -> None:
    def never(text: str, *_: Any) -> Any:
        raise AssertionError("scored")

    class Costly:
        self_information = never
        tokenizer = tokenizer()

    for saving in (100, 0.6):
        out = compress(scorer=Costly(), min_saving=saving, rate=0.5)
        assert out.text == PROSE and "could be saved, less than min_saving" in out.notes[0]
    assert compress(min_saving=0.1, rate=0.5).rate < 0.6


def test_a_saving_that_did_not_come() -> None:
    text = json.dumps({"a": list(range(30))}) + " or"
    out = compress(text, rate=0.2, min_saving=5)
    assert out.text == text
    assert out.notes[-1].endswith("tokens would be saved, less than min_saving: the text is returned as it was")


def test_the_predicted_loss_is_the_share_of_the_score_mass() -> None:
    losses = [compress(rate=rate, protect="none").predicted_loss for rate in (1.0, 0.8, 0.5, 0.2)]
    assert losses[0] == 0 and losses == sorted(losses) and losses[-1] < 0.8  # the best were kept: less than 1 - rate
    refused = compress(rate=0.2, protect="none", max_loss=0.1)
    assert refused.text == PROSE and "more than max_loss=0.1" in refused.notes[0]


# ---- lists, chunks, async, page -------------------------------------------------------------------------------------


def test_lists() -> None:
    texts = [PROSE, "One more. And another one here.", ""]
    seen: list[tuple[int, int]] = []
    out = compress(texts, rate=0.5, progress=lambda done, total: seen.append((done, total)))
    assert [o.text for o in out] == [compress(t, rate=0.5).text for t in texts]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    asked = compress([PROSE, PROSE], "embedding_sentences", 0.35, ["the keys of the porter", "password of the safe"])
    assert "porter" in asked[0].text and "blue-heron-77" in asked[1].text
    with pytest.raises(ThriftError, match="2 texts and 1 questions"):
        compress([PROSE, PROSE], question=["one"])
    with pytest.raises(ThriftError, match="compress_messages"):
        compress([{"role": "user", "content": "x"}])
    with pytest.raises(ThriftError, match="not int"):
        compress(["x", 3])


def test_chunks_are_scored_apart_and_chosen_from_together() -> None:
    text = "\n".join(f"Part {i}. {PROSE}" for i in range(4))
    seen: list[tuple[int, int]] = []
    out = compress(text, rate=0.4, chunk=150, protect="none", progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 3 and seen[-1] == (out.tokens_before, out.tokens_before)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert out.tokens_after == int(out.tokens_before * 0.4 + 0.5)
    whole = compress(text, rate=0.4, protect="none")  # a sentence on its own scores the same but for rounding
    same = sum(min(b, d) - max(a, c) for a, b in out.kept for c, d in whole.kept if max(a, c) < min(b, d))
    assert same > 0.9 * len(whole.text)
    per_question = compress(text, "embedding_sentences", 0.2, "the porter", chunk=100)
    assert per_question.text.count("porter") == 4
    with pytest.raises(ThriftError, match="does not choose by scores alone"):
        compress(text, "truncate", chunk=100)
    with pytest.raises(ThriftError, match="does not choose by scores alone"):
        compress(text, compat="percentile", chunk=100)


@pytest.mark.parametrize("text", [PROSE * 3, "x " * 500, "x" * 900, "", "日本。" * 100])
def test_chunks_tile_the_text(text: str) -> None:
    parts = chunks_of(text, 60, tokenizer())
    assert "".join(text[a:b] for a, b, _ in parts) == text
    assert all(a < b for a, b, _ in parts)
    assert not parts or parts[-1][2] == count_tokens(tokenizer(), text)
    sizes = [b - a for a, b in pairwise([0, *(done for _, _, done in parts)])]
    longest = max((count_tokens(tokenizer(), w) for w in text.split()), default=0)
    assert all(size <= max(60, longest + 2) for size in sizes)
    assert len(sizes) <= 2 * sum(sizes) / 60 + 2


def test_async_gives_the_same() -> None:
    async def several() -> list[Any]:
        async def beat() -> int:
            ticks = 0
            while not done.is_set():
                await asyncio.sleep(0.001)
                ticks += 1
            return ticks

        done = asyncio.Event()
        ticking = asyncio.create_task(beat())
        texts = await asyncio.gather(
            *(tt.acompress(PROSE, "selective_context", rate=rate, scorer=scorer()) for rate in (0.3, 0.6)),
            tt.acompress([PROSE], "selective_context", rate=0.6, scorer=scorer()),
            tt.acompress([{"role": "tool", "content": PROSE}], "selective_context", rate=0.6, scorer=scorer()),
        )
        done.set()
        return [await ticking, *texts]

    ticks, low, high, listed, chat = asyncio.run(several())
    assert ticks > 3  # the loop went on meanwhile
    assert low.text == compress(rate=0.3).text and high.text == compress(rate=0.6).text == listed[0].text
    assert chat.messages == [{"role": "tool", "content": high.text}]


def test_explain_shows_kinds() -> None:
    out = compress("<b>Look</b> at https://x.org/a for 5 km & more of the same old story.", rate=0.5)
    assert out.explain() == out.html()
    shown = out.explain(page=True)
    assert '<mark class="xml" title="xml">&lt;b&gt;</mark>' in shown
    assert '<mark class="url" title="url">https://x.org/a</mark>' in shown
    assert ".number { background" in shown and "<del>" in shown
    plain = shown[shown.index('<div class="compressed-text"') :]
    assert html.unescape(re.sub(r"<[^>]+>", "", plain)).strip() == out.original
    assert out.to_dict()["notes"] == list(out.notes)


def test_a_session_protects_if_asked() -> None:
    from .tiny import language_model

    with tt.apply("text=truncate(rate=0.3)", language_model(), tokenizer()) as session:
        assert "https://example.org" not in session.compress(PROSE).text
        assert "https://example.org/a?b=1" in session.compress(PROSE, protect="default").text


@pytest.mark.parametrize(
    "text",
    [
        "日本語の文章です。次の文も読みます。数字は5公里あります。" * 5,
        "กขค " * 60,
        "🙂👍🏽 " * 40,
        "\ufeffa\r\n\tb " * 50,
    ],
)
def test_any_script(text: str) -> None:
    out = compress(text, rate=0.5)
    assert out.text == join(text, out.kept) and 0 < out.rate <= 0.5 + 2 / out.tokens_before


@pytest.mark.slow
def test_a_line_of_ten_megabytes() -> None:
    text = " ".join(PROSE.split()) * 26_000
    assert len(text) > 10_000_000 and "\n" not in text
    out = compress_text([Truncate(rate=0.1)], text, None, tokenizer(), protect=Protection.of("structure"))
    assert out.tokens_after <= out.tokens_before * 0.5


# ---- tiktoken -------------------------------------------------------------------------------------------------------


def encoding() -> Any:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)}
    for n, piece in enumerate((b" a", b" t", b" th", b" the", b"in", b"er", b"\xe6\x97", b"\xe6\x97\xa5")):
        ranks[piece] = 256 + n
    pattern = r"\s*\p{L}+|\s*\p{N}{1,3}|\s*[^\s\p{L}\p{N}]+|\s+"
    return tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def test_tiktoken_counts_and_points() -> None:
    counter = as_tokenizer(encoding())
    text = "the 日本 🙂 winter 12"
    spans = token_spans(counter, text)
    assert len(spans) == count_tokens(counter, text) == len(encoding().encode(text))
    assert spans[:2] == [(0, 1), (1, 2)]
    assert text[slice(*next(s for s in spans if s[0] == 4))] == "日"
    assert spans[-1][1] == len(text) and all(a <= b for (a, _), (b, _) in pairwise(spans))
    out = compress(rate=0.5, tokenizer=encoding())
    assert out.tokens_after == len(encoding().encode(out.text)) <= out.tokens_before * 0.5 + 1


def test_tiktoken_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    made = encoding()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: made)
    out = compress(tokenizer="tiktoken:o200k_base", rate=0.5)
    assert out.tokens_before == len(made.encode(PROSE))
    with pytest.raises(ThriftError, match="knows no encoding or model 'no-such-model'"):
        compress(tokenizer="tiktoken:no-such-model")


def test_without_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ThriftError, match=r"pip install 'tokenthrift\[tiktoken\]'"):
        compress(tokenizer="tiktoken:gpt2")
    assert not isinstance(as_tokenizer(tokenizer()), TiktokenTokenizer)
