"""Chat messages: what is shortened, what is not, and that earlier turns never change."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import tokenthrift as tt
from tokenthrift.core.errors import ThriftError
from tokenthrift.ops.tokens import count_tokens
from tokenthrift.text import word_head

from .tiny import PROSE, HashingEmbedder, scorer, tokenizer, word_scorer

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "the river"}'}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": PROSE},
    {"role": "user", "content": PROSE, "name": "ana"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": PROSE},
    {"role": "assistant", "content": "Short."},
    {"role": "user", "content": [{"type": "text", "text": PROSE}, IMAGE, {"type": "text", "text": "And?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": PROSE, "cache_control": {"type": "ephemeral"}}]},
    {"role": "user", "content": PROSE},
]


@pytest.fixture(autouse=True)
def tiny_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_head, "load_word_scorer", lambda folder: word_scorer())


def compress(messages: Any = CHAT, *args: Any, **kwargs: Any) -> Any:
    given = copy.deepcopy(messages)
    out = tt.compress_messages(messages, *args, **{"scorer": scorer(), "embedder": HashingEmbedder(), **kwargs})
    assert messages == given  # what is given never changes
    return out


def test_only_texts_of_earlier_turns_are_shortened() -> None:
    out = compress(rate=0.5)
    short = tt.compress(PROSE, rate=0.5, scorer=scorer()).text
    assert short != PROSE
    assert out.messages == [
        CHAT[0],
        {"role": "user", "content": short, "name": "ana"},
        CHAT[2],
        {"role": "tool", "tool_call_id": "c1", "content": short},
        CHAT[4],
        {"role": "user", "content": [{"type": "text", "text": short}, IMAGE, {"type": "text", "text": "And?"}]},
        CHAT[6],
        CHAT[7],
    ]
    assert all(out.messages[i] is CHAT[i] for i in (0, 2, 4, 6, 7))
    assert set(out.texts) == {(1, None), (3, None), (5, 0)}
    of = [count_tokens(tokenizer(), t) for t in (PROSE, short, "Short.", "And?")]
    assert out.tokens_before == 6 * of[0] + of[2] + of[3]
    assert out.tokens_after == 3 * of[0] + 3 * of[1] + of[2] + of[3]
    assert out.summary.endswith("in 3 of 8 messages")
    assert out.to_dict()["texts"][2]["part"] == 0


def test_what_is_asked_for() -> None:
    changed = {i for i, _ in compress(rate=0.5, roles="system, user", keep_last=0).texts}
    assert changed == {0, 1, 5, 7}
    assert {i for i, _ in compress(rate=0.5, keep_last=2).texts} == {1, 3}
    assert {i for i, _ in compress(rate=0.5, keep_last=9).texts} == {3}
    assert compress(rate=0.5, skip_below=10**6).messages == CHAT
    assert compress([]).messages == []


def test_one_budget_for_all() -> None:
    total = compress(rate=1.0).tokens_before
    for tokens in (int(total * 0.9), int(total * 0.8)):
        out = compress(tokens=tokens, protect="none")
        assert tokens - 5 <= out.tokens_after <= tokens
        assert out.notes == ()
    out = compress(price=1.0, spend=total * 0.9e-6, protect="none")
    assert out.tokens_after <= total * 0.9
    out = compress(tokens=10)
    assert "more than the 10 asked for: the other messages stay" in out.notes[-1]


def test_the_last_turn_is_the_question() -> None:
    chat = [*CHAT[:4], {"role": "user", "content": "Where are the keys? Who is the porter?"}]
    out = compress(chat, "embedding_sentences", 0.2)
    assert "porter" in out.messages[3]["content"]
    assert "blue-heron-77" in compress(chat, "embedding_sentences", 0.35, "password of the safe").messages[3]["content"]


@pytest.mark.parametrize("roles", [None, ("user", "assistant", "tool")])
def test_later_turns_never_change_what_earlier_ones_became(roles: Any) -> None:
    whole = compress(append_only=True, rate=0.5, roles=roles).messages
    assert whole != CHAT
    for n in range(len(CHAT)):
        assert compress(CHAT[:n], append_only=True, rate=0.5, roles=roles).messages == whole[:n]
    assert (whole[1] == CHAT[1]) == (whole[7] == CHAT[7]) == (roles is None)  # one rule for every user turn
    # Without the option the last user turn is spared, and changes once it is not the last: what the option is for.
    assert compress(CHAT[:2], rate=0.5).messages[1] != compress(CHAT, rate=0.5).messages[1]


@pytest.mark.parametrize(
    ("messages", "kwargs", "said"),
    [
        ("text", {}, "not str"),
        ({"role": "user"}, {}, "not dict"),
        ([{"content": "x"}], {}, "message 0 has no role"),
        (["x"], {}, "message 0 has no role"),
        ([{"role": "user", "content": 3}], {}, "the content of message 0"),
        (CHAT, {"append_only": True, "tokens": 100}, "append_only shortens every message by itself"),
        (CHAT, {"append_only": True, "question": "what"}, "append_only shortens every message by itself"),
        (CHAT, {"append_only": True, "keep_last": 1}, "append_only shortens every message by itself"),
        (CHAT, {"keep_last": -1}, "keep_last=-1 is no number of turns"),
        (CHAT, {"skip_below": 0.5}, "skip_below=0.5 is no number of tokens"),
        (CHAT, {"roles": [1]}, "are no names"),
        (CHAT, {"rate": float("nan")}, "outside"),
        (CHAT, {"levl": "token"}, "did you mean 'level'"),
    ],
)
def test_mistakes(messages: Any, kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(ThriftError, match=said):
        compress(messages, **kwargs)
