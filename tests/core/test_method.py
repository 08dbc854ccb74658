"""The registry: declaring, finding and describing methods."""

import dataclasses
import json
import math
import sys
from importlib.metadata import EntryPoint

import pytest

from tokenthrift.core import method as registry
from tokenthrift.core.errors import ThriftError
from tokenthrift.core.method import STAGES, find, method, methods


@pytest.fixture
def empty(monkeypatch):
    """A registry that a test may fill."""
    monkeypatch.setattr(registry, "_registry", {})


def test_methods_come_in_the_order_of_stages_then_names():
    assert [m.name for m in methods()] == ["squeeze", "patches", "topk", "window"]
    assert [m.name for m in methods("cache")] == ["topk", "window"]
    assert methods("decode") == []


def test_info_describes_the_method(toys):
    info = find("topk")
    assert info is toys["topk"].info
    assert (info.name, info.stage, info.paper, info.arxiv) == ("topk", "cache", "Toys", "0000.00001")
    assert (info.needs, info.status, info.summary) == (("keys",), "checked", "Keep a few.")
    assert info.defaults == {"keep": 1.0, "mode": "mean", "scale": 1.0, "heads": None, "sink": False}
    assert find("window").defaults == {"size": ..., "limit": math.inf, "weights": [1, 2]}
    assert find("window").status == "partial"


def test_instances_are_frozen_and_keyword_only(toys):
    made = find("topk").make(keep=0.5)
    assert type(made) is toys["topk"]
    assert (made.keep, made.mode) == (0.5, "mean")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.keep = 1
    with pytest.raises(TypeError):
        toys["topk"](0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.info.name = "other"


def test_default_lists_are_not_shared():
    a, b = find("window").make(size=1), find("window").make(size=1)
    assert a == b and a.weights is not b.weights


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find("topk").make(kep=1), "topk has no parameter 'kep': did you mean 'keep'?"),
        (
            lambda: find("window").make(size=1, hidden=2),
            "window has no parameter 'hidden': known: limit, size, weights",
        ),
        (lambda: find("window").make(), "window needs the parameter 'size': write window(size=...)"),
        (lambda: find("top_k"), "unknown method 'top_k': did you mean 'topk'?"),
        (lambda: find("windows", "cache"), "unknown method 'windows' at stage cache: did you mean 'window'?"),
        (lambda: find("zzz", "cache"), "unknown method 'zzz' at stage cache: known: topk, window"),
        (lambda: find("zzz", "decode"), "unknown method 'zzz' at stage decode: known: patches, squeeze, topk, window"),
        (lambda: find("topk", "vision"), "topk is a method of stage 'cache', not 'vision': write cache=topk(...)"),
        (lambda: methods("cash"), "unknown stage 'cash': did you mean 'cache'?"),
    ],
)
def test_mistakes_are_one_line_that_helps(call, message):
    with pytest.raises(ThriftError) as error:
        call()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("annotation", "takes", "refuses"),
    [
        ("int", [3], [3.0, True, "3", None]),
        ("float", [3, 0.5, math.inf], [False, "fast"]),
        ("bool", [True], [1, "yes"]),
        ("int | None", [3, None], [0.5]),
        (int | float, [3, 0.5], ["big", True]),
        (str, ["sum"], [1]),
        ("list[int]", [[1], "anything"], []),
    ],
)
def test_parameters_are_of_the_type_that_is_written(empty, annotation, takes, refuses):
    cls = type("Typed", (), {"__annotations__": {"x": annotation}})
    info = method("typed", stage="cache", paper="P")(cls).info
    for value in takes:
        assert info.make(x=value).x is value
    for value in refuses:
        with pytest.raises(ThriftError, match="typed takes 'x' as"):
            info.make(x=value)


def test_to_dict_is_json():
    for info in methods():
        assert json.loads(json.dumps(info.to_dict(), allow_nan=False))["name"] == info.name
    assert find("topk").to_dict() == {
        "name": "topk",
        "stage": "cache",
        "paper": "Toys",
        "arxiv": "0000.00001",
        "needs": ["keys"],
        "status": "checked",
        "defaults": {"keep": 1.0, "mode": "mean", "scale": 1.0, "heads": None, "sink": False},
        "required": [],
        "summary": "Keep a few.",
    }
    window = find("window").to_dict()
    assert window["defaults"] == {"limit": "inf", "weights": [1, 2]}
    assert window["required"] == ["size"]


def test_declaring(empty):
    def declare(name="mine", stage="cache", qualname="Mine"):
        return method(name, stage=stage, paper="P")(type(qualname, (), {"__annotations__": {"n": int}, "n": 1}))

    first = declare()
    assert find("mine").cls is first and first(n=2).n == 2
    again = declare()  # the same class once more, as when a notebook cell runs twice
    assert find("mine").cls is again
    with pytest.raises(ValueError, match="two methods are called 'mine'"):
        declare(qualname="Other")
    assert find("mine").cls is again
    with pytest.raises(ValueError, match="unknown stage 'cash': did you mean 'cache'"):
        declare("other", stage="cash")
    with pytest.raises(ValueError, match="plans cannot call a method 'tree-search'"):
        declare("tree-search")
    for i, stage in enumerate(reversed(STAGES)):
        declare(f"m{i}", stage, f"C{i}")
    assert [m.stage for m in methods() if m.name != "mine"] == list(STAGES)


# ---- discovery -------------------------------------------------------------------------------------------------------


def test_entry_points_are_loaded_once(discover):
    discover.append(EntryPoint("harmless", "json.decoder:JSONDecoder", "tokenthrift.methods"))
    discover.append(EntryPoint("not ours", "no.such.module", "something.else"))
    assert methods() == []
    discover.append(EntryPoint("too late", "no.such.module", "tokenthrift.methods"))
    assert methods() == []  # looked for once


def test_a_method_of_an_entry_point_is_found(monkeypatch, tmp_path, discover):
    code = """
from tokenthrift.core.method import method

@method("plugged", stage="decode", paper="P")
class Plugged:
    depth: int = 4
"""
    (tmp_path / "toy_plugin_file.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    discover.append(EntryPoint("toy", "toy_plugin_file", "tokenthrift.methods"))
    assert find("plugged").make(depth=2).depth == 2
    assert [m.name for m in methods("decode")] == ["plugged"]
    monkeypatch.delitem(sys.modules, "toy_plugin_file")


def test_a_broken_plugin_is_named(discover):
    discover.append(EntryPoint("toy", "no_such_module_at_all", "tokenthrift.methods"))
    with pytest.raises(ThriftError, match=r"plugin 'toy' \(no_such_module_at_all\) cannot be imported: ModuleNotFound"):
        methods()


def test_families_are_searched_and_missing_ones_skipped(monkeypatch, tmp_path, discover):
    family = tmp_path / "toyfamily"
    family.mkdir()
    (family / "__init__.py").write_text("")
    (family / "one.py").write_text(
        "from tokenthrift.core.method import method\n"
        "@method('one', stage='codec', paper='P')\n"
        "class One:\n    n: int = 1\n"
    )
    import tokenthrift

    monkeypatch.setattr(tokenthrift, "__path__", [*tokenthrift.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "FAMILIES", ("nosuchfamily", "toyfamily"))
    assert [m.name for m in methods()] == ["one"]
    for name in [n for n in sys.modules if n.startswith("tokenthrift.toyfamily")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_family_with_a_missing_dependency_does_not_vanish(monkeypatch, tmp_path, discover):
    family = tmp_path / "toybroken"
    family.mkdir()
    (family / "__init__.py").write_text("import no_such_module_at_all\n")
    import tokenthrift

    monkeypatch.setattr(tokenthrift, "__path__", [*tokenthrift.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "FAMILIES", ("toybroken",))
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        methods()


def test_numbers_that_no_tensor_can_hold_are_refused():
    with pytest.raises(ThriftError, match="window 'size' has more than 64 bits"):
        find("window").make(size=2**63)
