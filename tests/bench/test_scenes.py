"""Scenes and their questions: drawn from a seed, and answered right by an independent look at the boxes."""

from __future__ import annotations

import random
import re
from collections import Counter

import numpy as np
import pytest

from tokenthrift.bench.scene_questions import KINDS, WORDINGS, ask
from tokenthrift.bench.scenes import COLOURS, NAMES, PLACES, SIZE, Scene, draw, held_out, lay_out
from tokenthrift.bench.seeing import Answers, blind, questions
from tokenthrift.core.errors import ThriftError


def scenes(count: int) -> list[Scene]:
    return [lay_out(random.Random(f"test {n}"), held_out()) for n in range(count)]


def test_a_seed_is_a_scene() -> None:
    a, b = scenes(3), scenes(3)
    assert a == b and a[0] != a[1]
    first, again = (np.asarray(draw(one[0], held_out())) for one in (a, b))
    assert first.shape == (SIZE, SIZE, 3) and (first == again).all()
    assert draw(a[0], held_out(), 518).size == (518, 518)


def test_items_lie_apart_inside_and_in_places_of_their_own() -> None:
    for scene in scenes(200):
        seen = np.zeros((SIZE, SIZE), dtype=int)
        for item in scene.items:
            assert item.left >= 0 and item.top >= 0 and max(item.left, item.top) + item.side <= SIZE
            seen[item.top : item.top + item.side, item.left : item.left + item.side] += 1
            row, column = divmod(item.place, 3)
            x, y = item.middle
            margin = min(abs(x - SIZE * edge / 3) for edge in (column, column + 1) if 0 < edge < 3)
            assert margin > 8 and min(abs(y - SIZE * edge / 3) for edge in (row, row + 1) if 0 < edge < 3) > 8
        assert seen.max() == 1
        assert len({item.place for item in scene.items}) == len(scene.items)


def test_an_item_is_painted_in_its_box_and_nowhere_else() -> None:
    scene = next(one for one in scenes(50) if len(one.items) == 1)
    item = scene.items[0]
    bare = np.asarray(draw(Scene((), scene.background, scene.crop, scene.light, scene.mirror), held_out()), dtype=int)
    changed = np.abs(np.asarray(draw(scene, held_out()), dtype=int) - bare).sum(-1) > 0
    box = np.zeros_like(changed)
    box[item.top : item.top + item.side, item.left : item.left + item.side] = True
    assert changed[box].mean() > 0.1 and not changed[~box].any()


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, list[tuple[str, str, str]]]]:
    return [
        (scene, [(q.text, q.answer, q.kind) for q in ask(scene, random.Random(n), 3)])
        for n, scene in enumerate(scenes(150))
    ]


def test_answers_are_right(asked: list[tuple[Scene, list[tuple[str, str, str]]]]) -> None:
    """From the question's words and the boxes alone."""
    checked: Counter[str] = Counter()
    for scene, found in asked:
        for text, answer, kind in found:
            assert answer == expected(scene, text), (text, answer, scene)
            checked[kind] += 1
    assert set(checked) == set(KINDS) and min(checked.values()) > 50


def expected(scene: Scene, text: str) -> str:
    """The answer, worked out in another way than by the module: from a drawn map, by regular expressions."""
    boxes = {name: [i for i in scene.items if i.name == name] for name in NAMES}
    words = [name for name in re.findall(r"\w+", text) if name.removesuffix("s") in NAMES or name in NAMES]
    about = [name if name in NAMES else name[:-1] for name in words]
    if "colour" in text:
        return COLOURS[boxes[about[0]][0].colour]
    if "how many" in text or text.startswith("count"):
        return str(len(boxes[about[0]]))
    if "its row" in text or "its column" in text:
        (me,) = boxes[about[0]]
        side = re.search(r"left of|right of|above|below", text).group()  # type: ignore[union-attr]
        across = side in ("left of", "right of")
        third = [int(v / (SIZE / 3)) for v in me.middle]
        found = []
        for item in scene.items:
            other = [int(v / (SIZE / 3)) for v in item.middle]
            ahead = other[0] - third[0] if across else other[1] - third[1]
            ahead = -ahead if side in ("left of", "above") else ahead
            if ahead > 0 and (other[1] == third[1] if across else other[0] == third[0]):
                found.append(item.name)
        assert len(found) < 2
        return found[0] if found else "nothing"
    if len(about) == 2:
        side = re.search(r"left of|right of|above|below", text).group()  # type: ignore[union-attr]
        for a in boxes[about[0]]:
            for b in boxes[about[1]]:
                ((ax, ay), (bx, by)) = a.middle, b.middle
                if {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[side]:
                    return "yes"
        return "no"
    if "where" in text or "what place" in text:
        (item,) = boxes[about[0]]
        return PLACES[place(*item.middle)]
    if about:
        return "yes" if boxes[about[0]] else "no"
    wanted = re.search(r"at the ([a-z ]+)[?.]", text).group(1)  # type: ignore[union-attr]
    return next((i.name for i in scene.items if PLACES[place(*i.middle)] == wanted), "nothing")


def place(x: float, y: float) -> int:
    return sum(x > SIZE * edge / 3 for edge in (1, 2)) + 3 * sum(y > SIZE * edge / 3 for edge in (1, 2))


def test_no_answer_is_frequent_enough_to_guess() -> None:
    some = questions(seed=1, count=700)
    shares = blind(some)
    assert sum(len(one.questions) for one in some) == 700
    assert shares["exists"] == pytest.approx(0.5, abs=0.03) and shares["relation"] == pytest.approx(0.5, abs=0.03)
    assert shares["what"] < 0.2 and shares["where"] < 0.2 and shares["count"] < 0.4 and shares["all"] < 0.35


def test_questions_come_from_the_seed() -> None:
    a, b, c = (questions(seed=seed, count=20) for seed in (3, 3, 4))
    assert [one.questions for one in a] == [one.questions for one in b] != [one.questions for one in c]
    with pytest.raises(ThriftError, match="at least 1 question"):
        questions(count=0)


def test_every_wording_is_used(asked: list[tuple[Scene, list[tuple[str, str, str]]]]) -> None:
    begun = {text.split()[0] for _, found in asked for text, _, _ in found}
    assert begun == {wording.split()[0] for wordings in WORDINGS.values() for wording in wordings}


def test_accuracy_and_interval() -> None:
    right = (True, True, False, True, False, False)
    answers = Answers(("a",) * 6, right, ("what", "where") * 3, (0, 0, 1, 1, 2, 2))
    assert answers.accuracy == 0.5
    assert answers.by_kind == {"what": pytest.approx(1 / 3), "where": pytest.approx(2 / 3)}
    low, high = answers.interval()
    assert low == 0.0 and high == 1.0  # three images: none, half and all right
    assert Answers(("a",) * 4, (True,) * 4, ("what",) * 4, (0, 0, 1, 1)).interval() == (1.0, 1.0)


def test_kinds_are_asked_as_often_as_wanted() -> None:
    scene = lay_out(random.Random(3), held_out())
    each = dict.fromkeys(KINDS, 0) | {"exists": 2, "what": 1}
    kinds = [question.kind for question in ask(scene, random.Random(0), each)]
    assert sorted(kinds) == ["exists", "exists", "what"]
