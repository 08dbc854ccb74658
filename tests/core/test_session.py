"""Session with a fake adapter: what is installed is undone, whatever happens, and what is recorded can be read."""

import json
from contextlib import ExitStack

import pytest
import torch

from tokenthrift.core.errors import ThriftError
from tokenthrift.core.plan import Plan
from tokenthrift.core.session import Session, StageRecord
from tokenthrift.core.tokenmap import TokenMap


class Model:
    """A model whose whole state is the list of what has been attached."""

    def __init__(self):
        self.attached = []


class FakeAdapter:
    stages = ("vision", "cache")

    def __init__(self, fail_at=None, fail_undo=False):
        self.model, self.log = Model(), []
        self.fail_at, self.fail_undo = fail_at, fail_undo

    def install(self, stage, methods, session, undo: ExitStack):
        for m in methods:
            undo.callback(self.undo, stage, m.info.name)
            self.model.attached.append((stage, m.info.name))
            self.log.append(f"+{m.info.name}")
            if m.info.name == self.fail_at:
                raise RuntimeError("no room")

    def undo(self, stage, name):
        self.log.append(f"-{name}")
        self.model.attached.remove((stage, name))
        if self.fail_undo:
            raise RuntimeError("stuck")


@pytest.fixture
def plan():
    return Plan.parse("cache=topk(keep=0.5) cache=window(size=2) vision=patches()")


def test_stages_install_in_request_order_and_undo_in_reverse(plan):
    adapter = FakeAdapter()
    with Session(plan, adapter) as session:
        assert adapter.model.attached == [("vision", "patches"), ("cache", "topk"), ("cache", "window")]
        assert isinstance(session, Session)
    assert adapter.model.attached == []
    assert adapter.log == ["+patches", "+topk", "+window", "-window", "-topk", "-patches"]


def test_an_exception_inside_restores_and_passes(plan):
    adapter = FakeAdapter()
    with pytest.raises(KeyboardInterrupt), Session(plan, adapter):
        raise KeyboardInterrupt
    assert adapter.model.attached == []
    with pytest.raises(ZeroDivisionError), Session(plan, adapter):
        raise ZeroDivisionError
    assert adapter.model.attached == []


@pytest.mark.parametrize("fail_at", ["patches", "topk", "window"])
def test_a_failing_install_leaves_nothing_behind(plan, fail_at):
    adapter = FakeAdapter(fail_at)
    session = Session(plan, adapter)
    with pytest.raises(RuntimeError, match="no room"):
        session.install()
    assert adapter.model.attached == []
    session.remove()  # nothing left to remove
    adapter.fail_at = None
    with session:  # and the session can still be used
        assert len(adapter.model.attached) == 3
    assert adapter.model.attached == []


def test_a_failing_undo_does_not_stop_the_others(plan):
    adapter = FakeAdapter(fail_undo=True)
    with pytest.raises(RuntimeError, match="stuck"), Session(plan, adapter):
        pass
    assert adapter.model.attached == []


def test_installing_twice_is_an_error_and_once_again_is_not(plan):
    adapter = FakeAdapter()
    session = Session(plan, adapter).install()
    with pytest.raises(ThriftError, match="already installed"):
        session.install()
    with pytest.raises(ThriftError, match="already installed"), session:
        pass
    assert len(adapter.model.attached) == 3
    session.remove()
    session.remove()
    assert adapter.log.count("-topk") == 1
    with session:
        assert len(adapter.model.attached) == 3
    assert adapter.model.attached == []


def test_an_empty_plan_touches_nothing():
    adapter = FakeAdapter()
    with Session(Plan(), adapter) as session:
        pass
    assert adapter.log == [] and session.report().stages == {} and session.provenance() == {}


def test_stages_that_the_model_has_not():
    adapter = FakeAdapter()
    adapter.stages = ("vision",)
    with pytest.raises(ThriftError) as error:
        Session(Plan.parse("topk()"), adapter)
    assert str(error.value) == "Model has no stage 'cache' here; it offers: text, vision"
    assert adapter.log == []


# ---- records ---------------------------------------------------------------------------------------------------------


def filled(plan):
    session = Session(plan, FakeAdapter())
    with session:
        session.record("cache", before=100, after=25, bytes_before=4_000_000, bytes_after=1_000_000, seconds=0.5)
        session.record("cache", before=100, after=75, seconds=0.25).extra["evictions"] = 3.0
        session.record("vision", before=0, after=0)
        session.count_forward(2e9, 3e9)
        session.count_forward(1e9, 3e9)
    return session


def test_records_add_up(plan):
    report = filled(plan).report()
    cache = StageRecord(2, 200, 100, 4_000_000, 1_000_000, 0.75, {"evictions": 3.0})
    assert report.stages["cache"] == cache
    assert (report.stages["cache"].kept, report.stages["vision"].kept) == (0.5, 1.0)
    assert (report.forwards, report.flops, report.flops_dense) == (2, 3e9, 6e9)
    assert report.plan == str(plan)


def test_to_dict_is_json_and_a_copy(plan):
    session = filled(plan)
    plain = session.report().to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert set(plain) == {"plan", "forwards", "flops", "flops_dense", "stages"}
    assert plain["stages"]["cache"] == {
        "calls": 2,
        "tokens_before": 200,
        "tokens_after": 100,
        "bytes_before": 4_000_000,
        "bytes_after": 1_000_000,
        "seconds": 0.75,
        "extra": {"evictions": 3.0},
        "tallies": {},
        "kept": 0.5,
    }
    plain["stages"]["cache"]["extra"]["evictions"] = 0
    assert session.report().stages["cache"].extra == {"evictions": 3.0}


def test_a_report_does_not_change_afterwards(plan):
    session = filled(plan)
    before = session.report()
    session.record("cache", before=1, after=1).extra["evictions"] = 9.0
    assert before.stages["cache"].calls == 2 and before.stages["cache"].extra == {"evictions": 3.0}
    assert session.report().stages["cache"].calls == 3


def test_to_markdown(plan):
    report = filled(plan).report()
    lines = report.to_markdown().split("\n")
    assert lines[0] == f"plan: `{plan}`; 2 forwards, 3.00 GFLOPs (6.00 without the plan)"
    assert lines[4] == "| cache | 2 | 200 | 100 | 50.0% | 4.00 | 1.00 | 0.7500 |"
    assert {line.count("|") for line in lines[2:] if line.startswith("|")} == {9}
    assert lines[-2:] == ["", "cache: evictions 3"]
    assert str(report) == report.to_markdown()
    assert "plan: `none`" in Session(Plan(), FakeAdapter()).report().to_markdown()


def test_tallies_add_up_and_long_ones_are_shortened_for_reading(plan):
    session = Session(plan, FakeAdapter())
    for _ in range(2):
        record = session.record("cache", before=1, after=1)
        record.tally("source", "lookup", 4, 1)
        for depth in range(1, 14):
            record.tally("depth", str(depth), 14 - depth, depth == 1)
    report = session.report()
    session.record("cache", before=1, after=1).tally("source", "lookup", 1, 1)
    plain = report.to_dict()["stages"]["cache"]["tallies"]
    assert json.loads(json.dumps(plain)) == plain
    assert plain["source"] == {"lookup": {"tried": 8, "accepted": 2, "share": 0.25}}
    assert list(plain["depth"]) == [str(depth) for depth in range(1, 14)]
    assert plain["depth"]["13"] == {"tried": 2, "accepted": 0, "share": 0.0}
    lines = report.to_markdown().split("\n")
    at = lines.index("| cache, guesses by | tried | accepted | share |")
    assert lines[at + 2 : at + 4] == ["| source lookup | 8 | 2 | 25.0% |", "| depth 1 | 26 | 2 | 7.7% |"]
    assert lines[-1] == "| depth 9 to 13 | 30 | 0 | 0.0% |" and len(lines) == at + 2 + 10


# ---- provenance ------------------------------------------------------------------------------------------------------


def test_chained_maps_compose(plan):
    session = Session(plan, FakeAdapter())
    first = TokenMap.select(torch.tensor([[3, 1, 0]]), 4)
    second = TokenMap.merge(torch.tensor([[0, 1, 0]]))
    third = TokenMap.select(torch.tensor([[0]]), 2)
    for m in (first, second, third):
        session.add_map("vision", m)
    assert session.provenance()["vision"].provenance() == [[[(0, 0.5), (3, 0.5)]]]
    session.start_maps("cache")
    assert session.provenance()["vision"].n_in == 4
    session.start_maps("vision")
    assert session.provenance() == {}
    session.add_map("vision", second)
    assert session.provenance()["vision"] is second


def test_maps_of_layers_stand_side_by_side(plan):
    session = Session(plan, FakeAdapter())
    maps = {layer: TokenMap.select(torch.tensor([[layer]]), 4) for layer in (0, 2)}
    for layer, m in maps.items():
        session.add_map("cache", m, layer)
    session.add_map("vision", TokenMap.identity(2))
    seen = session.provenance()
    assert set(seen) == {"cache", "vision"} and seen["cache"] == maps
    session.add_map("cache", maps[0], 5)
    assert 5 not in seen["cache"]
    session.start_maps("cache")
    assert set(session.provenance()) == {"vision"}


# ---- text ------------------------------------------------------------------------------------------------------------


class Compressed:
    tokens_before, tokens_after, seconds = 4, 2, 0.125
    map = TokenMap.select(torch.tensor([[0, 2]]), 4)


def test_text_is_not_installed_but_called(toys):
    calls = []

    def compressor(methods, text, question):
        calls.append((methods, text, question))
        return Compressed()

    adapter = FakeAdapter()
    with Session(Plan.parse("squeeze(rate=0.25) topk()"), adapter, compressor) as session:
        assert adapter.log == ["+topk"]
        out = session.compress("a b c d", question="what?")
        session.compress("again")
    assert isinstance(out, Compressed)
    assert calls[0] == ([toys["squeeze"](rate=0.25)], "a b c d", "what?")
    assert session.report().stages["text"] == StageRecord(2, 8, 4, seconds=0.25)
    assert session.provenance()["text"] is Compressed.map  # the last prompt's alone


def test_compress_needs_a_tokenizer(plan):
    with pytest.raises(ThriftError, match="processor=tokenizer"):
        Session(plan, FakeAdapter()).compress("x")
