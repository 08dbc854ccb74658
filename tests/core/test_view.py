"""View: parts are computed when read, once, and never otherwise."""

import copy

import pytest

from tokenthrift.core.errors import ThriftError
from tokenthrift.core.view import Lazy, View


def counted(calls, name, value):
    return Lazy(lambda: (calls.append(name), value)[1])


def test_parts_are_computed_on_first_use_only():
    calls = []
    view = View(layer=3, keys=counted(calls, "keys", "K"), values=counted(calls, "values", None))
    assert calls == [] and view.computed() == {"layer"}
    assert (view.layer, view.keys, view.keys) == (3, "K", "K")
    assert calls == ["keys"] and view.computed() == {"layer", "keys"}
    assert view.values is None and view.values is None  # None is a value
    assert calls == ["keys", "values"]


def test_looking_does_not_compute():
    calls = []
    view = View(keys=counted(calls, "keys", 1), layer=0)
    assert "keys" in view and "layer" in view and "values" not in view
    assert sorted(view) == ["keys", "layer"]
    assert view.require(("keys", "layer")) is view
    assert calls == []


def test_one_lazy_part_may_read_another():
    view = View(features=2)
    view.offer("keys", Lazy(lambda: view.features * 10))
    assert view.keys == 20


def test_functions_are_values_unless_lazy():
    view = View(attention=lambda rows: rows + 1)
    assert view.attention(1) == 2


def test_a_new_offer_takes_the_place_of_the_old():
    view = View(keys=1)
    view.offer("keys", Lazy(lambda: 2))
    assert "keys" not in view.computed() and view.keys == 2
    view.offer("keys", 3)
    assert view.keys == 3
    view.offer("keys", Lazy(lambda: 4))
    assert view.keys == 4


def test_a_part_that_fails_is_tried_again():
    tries = []

    def fail_once():
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("not yet")
        return 5

    view = View(keys=Lazy(fail_once))
    with pytest.raises(RuntimeError, match="not yet"):
        view.keys  # noqa: B018
    assert view.keys == 5


def test_missing_parts_are_named():
    view = View(keys=1, layer=2)
    with pytest.raises(AttributeError, match="the view has no part 'grid'; it has: keys, layer"):
        view.grid  # noqa: B018
    assert not hasattr(view, "grid")
    with pytest.raises(ThriftError) as error:
        view.require(["keys", "grid", "text"])
    assert str(error.value) == "this stage cannot offer 'grid', 'text'; it has: keys, layer"


def test_copies_work():
    view = copy.copy(View(keys=1))
    assert view.keys == 1
