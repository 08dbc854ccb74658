"""Questions about scenes, each with one right answer of one or two words, in several wordings.

Everything a question can be about is listed first and then drawn from, so that no answer is much more frequent than
the others: whoever answers without looking is hardly ever right.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from .scenes import COLOURS, NAMES, PLACES, Item, Scene

NOTHING = "nothing"
NUMBERS = ("0", "1", "2", "3", "4")
_APART = 12
"""Pixels by which centres must differ to be called left of, or above, one another."""


@dataclass(frozen=True)
class Question:
    """A question about one scene."""

    text: str
    answer: str
    kind: str


WORDINGS: dict[str, tuple[str, ...]] = {
    "what": ("what is at the {place}?", "what do you see at the {place}?", "name what is at the {place}."),
    "where": ("where is the {name}?", "in what place is the {name}?", "say where the {name} is."),
    "count": ("how many {name}s are there?", "how many {name}s do you see?", "count the {name}s."),
    "exists": ("is there a {name}?", "do you see a {name}?", "is a {name} to be seen?"),
    "colour": ("what colour is the {name}?", "what is the colour of the {name}?", "name the colour of the {name}."),
    "relation": ("is there a {name} {side} a {other}?", "is a {name} {side} a {other}?"),
    "beside": ("what is {side} the {name} in its {line}?", "name what is {side} the {name} in its {line}."),
}
KINDS = tuple(WORDINGS)

# What a side means: the axis to compare (0 is x), and the sign of the other's distance.
_SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


def ask(
    scene: Scene, rng: random.Random, each: int | Mapping[str, int], used: Counter[tuple[str, str]] | None = None
) -> list[Question]:
    """Up to `each` questions of every kind; no question twice.

    Args:
        scene: what is asked about.
        rng: decides between questions whose answers are equally frequent, and the wording.
        each: questions of a kind, or how many of which.
        used: how often every (kind, answer) was right before; rare ones are preferred, and the counts are kept here.
    """
    used = Counter() if used is None else used
    found = []
    for kind in KINDS:
        by_answer: dict[str, list[dict[str, str]]] = defaultdict(list)
        for about, answer in _POSSIBLE[kind](scene):
            by_answer[answer].append(about)
        for _ in range(each if isinstance(each, int) else each[kind]):
            if not by_answer:
                break
            rarest = min(used[kind, answer] for answer in by_answer)
            answer = rng.choice([answer for answer in by_answer if used[kind, answer] == rarest])
            about = by_answer[answer].pop(rng.randrange(len(by_answer[answer])))
            if not by_answer[answer]:
                del by_answer[answer]
            used[kind, answer] += 1
            found.append(Question(rng.choice(WORDINGS[kind]).format(**about), answer, kind))
    return found


Possible = Iterator[tuple[dict[str, str], str]]


def _what(scene: Scene) -> Possible:
    there = {item.place: item.name for item in scene.items}
    for number, place in enumerate(PLACES):
        yield {"place": place}, there.get(number, NOTHING)


def _where(scene: Scene) -> Possible:
    for item in _single(scene):
        yield {"name": item.name}, PLACES[item.place]


def _count(scene: Scene) -> Possible:
    there = Counter(item.name for item in scene.items)
    for name in NAMES:
        if there[name] < len(NUMBERS):
            yield {"name": name}, NUMBERS[there[name]]


def _exists(scene: Scene) -> Possible:
    there = {item.name for item in scene.items}
    for name in NAMES:
        yield {"name": name}, "yes" if name in there else "no"


def _colour(scene: Scene) -> Possible:
    for item in _single(scene):
        yield {"name": item.name}, COLOURS[item.colour]


def _relation(scene: Scene) -> Possible:
    """Only where all pairs are clearly on one side; both things are there, so that seeing them is not enough."""
    for name in NAMES:
        for other in NAMES:
            pairs = [(a, b) for a in scene.items for b in scene.items if a.name == name and b.name == other]
            if name == other or not pairs:
                continue
            for side, (axis, sign) in _SIDES.items():
                ahead = [sign * (a.middle[axis] - b.middle[axis]) for a, b in pairs]
                if all(abs(distance) > _APART for distance in ahead):
                    answer = "yes" if max(ahead) > 0 else "no"
                    yield {"name": name, "side": side, "other": other}, answer


def _beside(scene: Scene) -> Possible:
    """Things in the same row or column of places, where there is one of them at most on that side."""
    for item in _single(scene):
        for side, (axis, sign) in _SIDES.items():
            here = divmod(item.place, 3)
            found = []
            for other in scene.items:
                there = divmod(other.place, 3)
                # A place is (row, column): what is left or right differs in the column, and shares the row.
                if other is not item and there[axis] == here[axis] and sign * (there[1 - axis] - here[1 - axis]) > 0:
                    found.append(other.name)
            if len(found) < 2:
                line = "column" if axis else "row"
                yield {"name": item.name, "side": side, "line": line}, found[0] if found else NOTHING


def _single(scene: Scene) -> list[Item]:
    """The items that "the bag" can mean."""
    there = Counter(item.name for item in scene.items)
    return [item for item in scene.items if there[item.name] == 1]


_POSSIBLE: dict[str, Callable[[Scene], Possible]] = {
    "what": _what,
    "where": _where,
    "count": _count,
    "exists": _exists,
    "colour": _colour,
    "relation": _relation,
    "beside": _beside,
}
