"""Chat messages: the texts in them are shortened, everything else stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import ThriftError
from .compressed import CompressedText

Message = Mapping[str, Any]
Place = tuple[int, int | None]
"""A message, and a part of its content; None where the content is one text."""

TEXT_PARTS = ("text", "input_text", "output_text")
SHORTENED = ("user", "assistant", "tool", "function")
SHORTENED_FOR_GOOD = ("assistant", "tool", "function")
"""Roles that are shortened by default; the second in conversations whose earlier turns must not change."""


@dataclass(frozen=True)
class CompressedMessages:
    """Messages with shorter contents.

    Attributes:
        messages: as many as before, in the same order and with the same roles; those that did not change are the very
            objects that were given.
        original: the messages before.
        texts: what was done to each text that was shortened, by (message, part of its content or None).
        tokens_before, tokens_after: of all texts in the contents. What a chat template adds, tool calls, tool schemas
            and images are not counted.
        notes: what did not go as asked.
    """

    messages: list[Any]
    original: list[Any] = field(repr=False)
    texts: dict[Place, CompressedText] = field(repr=False)
    tokens_before: int
    tokens_after: int
    notes: tuple[str, ...] = ()

    @property
    def rate(self) -> float:
        """Share of the tokens kept."""
        return self.tokens_after / self.tokens_before if self.tokens_before else 1.0

    @property
    def summary(self) -> str:
        """One line: how many tokens of how many, in how many messages."""
        changed = len({i for i, _ in self.texts})
        return (
            f"{self.tokens_before:,} -> {self.tokens_after:,} tokens ({self.rate:.1%} kept) "
            f"in {changed} of {len(self.messages)} messages"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        names = ("messages", "tokens_before", "tokens_after", "rate")
        texts = [{"message": i, "part": part, **text.to_dict()} for (i, part), text in self.texts.items()]
        return {**{name: getattr(self, name) for name in names}, "texts": texts, "notes": list(self.notes)}


def compress_messages(
    messages: Sequence[Message],
    shorten: Callable[[str, float | int | None, str | None], CompressedText],
    count: Callable[[str], int],
    target: float | int | None = None,
    question: str | None = None,
    *,
    roles: Sequence[str] | None = None,
    keep_last: int | None = None,
    skip_below: int = 64,
    append_only: bool = False,
) -> CompressedMessages:
    """Shorten the contents of the messages of some roles; see :func:`tokenthrift.compress_messages`.

    Args:
        messages: mappings with ``role`` and ``content``: a text, a list of parts, or None.
        shorten: gives ``(text, target, question)`` its short form.
        count: tokens of a text.
        target: a share for every text, or a count for all texts of all messages; None leaves it to the method.
        question: for methods that look at one.
        roles, keep_last, skip_below, append_only: see there.
    """
    _check(messages)
    roles = _roles(roles, append_only)
    if append_only:
        if keep_last or question is not None or isinstance(target, int):
            raise ThriftError(
                "append_only shortens every message by itself, so that later turns change nothing: "
                "leave out keep_last, question, tokens and spend, and give a rate"
            )
        keep_last = 0
    keep_last = 1 if keep_last is None else keep_last
    for name, number in (("keep_last", keep_last), ("skip_below", skip_below)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise ThriftError(f"{name}={number!r} is no number of {'turns' if name == 'keep_last' else 'tokens'}")

    turns = [i for i, message in enumerate(messages) if message["role"] == "user"]
    last = set(turns[len(turns) - keep_last :]) if keep_last else set()
    if question is None and not append_only and turns:
        question = "\n".join(text for _, text in _texts(turns[-1], messages[turns[-1]])) or None

    sizes = {at: count(text) for i, message in enumerate(messages) for at, text in _texts(i, message)}
    before = sum(sizes.values())
    open_to_change = {
        (i, part): text
        for i, message in enumerate(messages)
        if message["role"] in roles and i not in last
        for (i, part), text in _texts(i, message, changeable=True)
        if sizes[i, part] >= max(skip_below, 1)
    }
    texts: dict[Place, CompressedText] = {}
    left = sum(sizes[at] for at in open_to_change)
    room = target - (before - left) if isinstance(target, int) else left
    for at, text in open_to_change.items():
        asked = target
        if isinstance(target, int):  # in proportion, and what a text leaves unused goes to those after it
            asked = min(max(room * sizes[at] // left, 1), sizes[at])
        texts[at] = shorten(text, asked, question)
        left -= sizes[at]
        room -= texts[at].tokens_after
    after = before + sum(text.tokens_after - sizes[at] for at, text in texts.items())

    notes = [
        f"message {i}{'' if part is None else f', part {part}'}: {note}"
        for (i, part), text in texts.items()
        for note in text.notes
    ]
    if isinstance(target, int) and after > target:
        notes.append(f"{after} tokens are left, more than the {target} asked for: the other messages stay as they are")
    changed = {at: text for at, text in texts.items() if text.text != text.original}
    return CompressedMessages(
        [_with_texts(i, message, changed) for i, message in enumerate(messages)],
        list(messages),
        changed,
        before,
        after,
        tuple(notes),
    )


def _texts(i: int, message: Message, changeable: bool = False) -> Iterator[tuple[Place, str]]:
    """The texts of a message's content; of parts that the provider was told to cache only those that may change."""
    content = message.get("content")
    if isinstance(content, str):
        yield (i, None), content
        return
    for part, item in enumerate(content or ()):
        is_text = isinstance(item, Mapping) and item.get("type") in TEXT_PARTS and isinstance(item.get("text"), str)
        if is_text and not (changeable and "cache_control" in item):
            yield (i, part), item["text"]


def _with_texts(i: int, message: Message, texts: Mapping[Place, CompressedText]) -> Any:
    """The message with its new texts; what was given is never changed."""
    if (i, None) in texts:
        return {**message, "content": texts[i, None].text}
    if not any(at[0] == i for at in texts):
        return message
    parts = [
        {**part, "text": texts[i, n].text} if (i, n) in texts else part for n, part in enumerate(message["content"])
    ]
    return {**message, "content": parts}


def _roles(roles: Sequence[str] | None, append_only: bool) -> Sequence[str]:
    if roles is None:
        return SHORTENED_FOR_GOOD if append_only else SHORTENED
    if isinstance(roles, str):
        roles = [role.strip() for role in roles.split(",")]
    if not all(isinstance(role, str) for role in roles):
        raise ThriftError(f"roles={roles!r} are no names: write roles=('user', 'tool')")
    return roles


def _check(messages: Any) -> None:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ThriftError(f"messages are a list of {{'role': ..., 'content': ...}}, not {type(messages).__name__}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ThriftError(f"message {i} has no role: write {{'role': 'user', 'content': ...}}")
        if not isinstance(message.get("content"), str | list | tuple | None):
            kind = type(message["content"]).__name__
            raise ThriftError(f"the content of message {i} is a text, a list of parts or None, not {kind}")
