"""Which texts of a request may be shortened."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tokenthrift.integrations.gateway.contents import entries, question, slots
from tokenthrift.integrations.gateway.policy import Route

USERS, ALL = Route(min_chars=0), Route(min_chars=0, roles=("user", "assistant", "tool"), last_user=True)
CHAT = [
    {"role": "system", "content": "system"},
    {"role": "developer", "content": "developer"},
    {"role": "user", "content": "u1", "name": "Ann"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "1", "content": "t1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": [{"type": "text", "text": "u2"}, {"type": "image_url", "image_url": {"url": "u"}}]},
    {"role": "user", "content": [{"type": "text", "text": "cached", "cache_control": {"type": "ephemeral"}}]},
    {"role": "assistant", "content": "a2"},
    {"role": "user", "content": "u3"},
    {"role": "user", "content": [{"type": "text", "text": "u4"}, "odd", {"type": ["text"]}]},
    {"role": "tool", "content": "t2"},
]


def texts(value: Any, route: Route, field: str = "messages") -> list[str]:
    return [slot.text for slot in slots({field: value}, field, route)]


def test_chats() -> None:
    assert texts(CHAT, USERS) == ["u1", "u2"]
    assert texts(CHAT, ALL) == ["u1", "t1", "a1", "u2", "a2", "u3", "u4", "t2"]
    assert texts(CHAT, Route(min_chars=3, last_user=True)) == []
    assert question({"messages": CHAT}, "messages") == "u3\nu4"
    assert entries({"messages": CHAT}, "messages") == len(CHAT)


def test_putting_back_changes_these_texts_only() -> None:
    body = {"messages": copy.deepcopy(CHAT), "model": "m", "tools": [{"type": "function"}]}
    for slot in slots(body, "messages", USERS):
        slot.put("")
    expected = copy.deepcopy(CHAT)
    expected[2]["content"] = expected[6]["content"][0]["text"] = ""  # type: ignore[index]
    assert body == {"messages": expected, "model": "m", "tools": [{"type": "function"}]}


def test_prompts_are_shortened_only_when_asked() -> None:
    assert texts("a prompt", USERS, "prompt") == []
    assert texts("a prompt", ALL, "prompt") == ["a prompt"]
    assert texts(["one", "two"], ALL, "prompt") == ["one", "two"]
    assert texts([1, 2, 3], ALL, "prompt") == texts([[1], [2]], ALL, "prompt") == []
    assert entries({"prompt": [1] * 9999}, "prompt") == 0


def test_items_of_responses() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "u1"}]},
        {"type": "function_call", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "t1"},
        {"type": "message", "role": "user", "content": "u2"},
    ]
    assert texts(items, USERS, "input") == ["u1"]
    assert texts(items, ALL, "input") == ["u1", "t1", "u2"]
    assert texts("all of it", USERS, "input") == []


@pytest.mark.parametrize("value", [None, 5, {}, [], [[]], [None], [{"role": {}}], [{"role": "user"}], ""])
def test_anything_else_has_none(value: Any) -> None:
    for field in ("messages", "prompt", "input"):
        assert texts(value, ALL, field) == []
        assert question({field: value}, field) is None
    assert slots({}, "messages", ALL) == []
