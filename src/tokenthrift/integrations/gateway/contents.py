"""Which texts of a request may be shortened, and how they go back. Everything else of it stays as it is.

System and developer prompts, tools, tool calls, names, images and whatever carries a ``cache_control`` mark are never
touched; what a message becomes depends on that message alone, so that an unchanged history keeps its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .policy import Route

FIELDS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/responses": "input"}
"""The paths whose JSON is read, and where their prompt is. Other paths go through unread."""

_TEXT_PARTS = ("text", "input_text")


@dataclass(frozen=True)
class Slot:
    """A place in the request's JSON that holds a text."""

    holder: Any
    key: str | int

    @property
    def text(self) -> str:
        text: str = self.holder[self.key]
        return text

    def put(self, text: str) -> None:
        """Replace the text."""
        self.holder[self.key] = text


def entries(body: dict[str, Any], field: str) -> int:
    """How many messages (or prompts, or items) the request has; token ids are no entries."""
    value = body.get(field)
    return sum(not isinstance(entry, int) for entry in value) if isinstance(value, list) else 1


def slots(body: dict[str, Any], field: str, route: Route) -> list[Slot]:
    """The texts that a route's policy lets be shortened, in the order of the request."""
    return [s for s in _candidates(body, field, route) if len(s.text) >= max(route.min_chars, 1)]


def question(body: dict[str, Any], field: str) -> str | None:
    """The last user turn."""
    value = body.get(field)
    if field == "prompt" or not isinstance(value, list):
        return None
    start, end = _last_turn(value)
    found = [slot.text for message in value[start:end] for slot in _texts(message, "content")]
    return "\n".join(found) or None


def _candidates(body: dict[str, Any], field: str, route: Route) -> Iterator[Slot]:
    value = body.get(field)
    if isinstance(value, str):  # a prompt, or an input that is all the user's turn
        if route.last_user:
            yield Slot(body, field)
    elif isinstance(value, list) and field == "prompt":
        if route.last_user:
            yield from (Slot(value, i) for i, prompt in enumerate(value) if isinstance(prompt, str))
    elif isinstance(value, list):
        start, end = _last_turn(value)
        for i, message in enumerate(value):
            if start <= i < end and not route.last_user:
                continue
            if _role(message) in route.roles:
                # An item of /v1/responses that holds a tool's answer has it under `output`.
                yield from _texts(message, "output" if message.get("type") == "function_call_output" else "content")


def _texts(message: Any, key: str) -> Iterator[Slot]:
    """The texts of one message: its content, or the content's parts that are text."""
    if not isinstance(message, dict) or "cache_control" in message:
        return
    content = message.get(key)
    if isinstance(content, str):
        yield Slot(message, key)
    elif isinstance(content, list):
        for part in content:
            plain = isinstance(part, dict) and part.get("type") in _TEXT_PARTS and "cache_control" not in part
            if plain and isinstance(part.get("text"), str):
                yield Slot(part, "text")


def _role(message: Any) -> str:
    if not isinstance(message, dict):
        return ""
    if message.get("type") == "function_call_output":
        return "tool"
    role = message.get("role")
    return role if isinstance(role, str) else ""


def _last_turn(messages: list[Any]) -> tuple[int, int]:
    """The last run of user messages: start and end. What follows it (tool calls and their answers) is not of it."""
    end = next((i + 1 for i in reversed(range(len(messages))) if _role(messages[i]) == "user"), 0)
    start = end
    while start and _role(messages[start - 1]) == "user":
        start -= 1
    return start, end
