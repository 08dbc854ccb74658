"""Plans: every form reads to the same steps, prints back, and every mistake is one line."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenthrift.core.errors import ThriftError
from tokenthrift.core.method import find
from tokenthrift.core.plan import Plan, Step

# ---- round trips -----------------------------------------------------------------------------------------------------

texts = st.text(max_size=8) | st.text("ab '\"\\()[]{}=,:#\n", max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(texts, inner, max_size=2)
    ),
    max_leaves=5,
)


@st.composite
def steps(draw):
    name, params = draw(
        st.sampled_from(
            [
                ("topk", ("keep", "mode", "scale", "heads", "sink")),
                ("window", ("limit", "weights")),
                ("patches", ("ratio", "pairs")),
                ("squeeze", ("rate",)),
            ]
        )
    )
    chosen = {p: draw(values) for p in params if draw(st.booleans())}
    if name == "window":
        chosen["size"] = draw(values)
    return name, chosen


def plan_of(drawn):
    infos = [(find(name), params) for name, params in drawn]
    return Plan([Step(info.stage, info.make(**params)) for info, params in infos])


@given(st.lists(steps(), max_size=3))
def test_printing_and_parsing_gives_the_same_plan(drawn):
    plan = plan_of(drawn)
    again = Plan.parse(str(plan))
    assert again == plan and hash(again) == hash(plan)
    assert str(again) == str(plan)
    assert repr(again.steps) == repr(plan.steps)
    assert Plan.parse("\n ".join(map(str, plan))) == plan
    assert eval(repr(plan)) == plan


@given(st.lists(steps(), max_size=3))
def test_yaml_gives_the_same_plan(drawn):
    plan = plan_of(drawn)
    text = plan.to_yaml()
    again = Plan.from_yaml(text)
    assert again == plan
    for stage in plan.stages:
        assert repr(again.at(stage)) == repr(plan.at(stage))
    assert Plan.parse(text) == plan


def test_numbers_come_back_as_they_were():
    for text in ("1e-05", "1e+300", "inf", "-inf", "nan", "-0.0", "1", "True", "None", "(1,)", "[nan, (-inf, 2)]"):
        plan = Plan.parse(f"cache=window(size={text})")
        assert str(plan) == f"cache=window(size={text})"
        assert Plan.from_yaml(plan.to_yaml()) == plan
    assert math.isnan(Plan.parse("window(size=nan)").at("cache")[0].size)


def test_what_was_written_is_printed_and_of_the_rest_what_differs_from_the_defaults():
    assert str(Plan.parse("topk(keep=1.0, sink=false)")) == "cache=topk(keep=1.0, sink=False)"
    assert str(Plan.parse("topk(mode=mean, keep=0.5)")) == "cache=topk(keep=0.5, mode='mean')"
    assert str(Plan.parse("window(size=1)")) == "cache=window(size=1)"
    assert str(Plan(cache=find("topk").make(keep=0.5, mode="mean"))) == "cache=topk(keep=0.5)"
    assert Plan.parse("topk(keep=1.0)").to_yaml() == "cache:\n  topk:\n    keep: 1.0\n"


def test_writing_a_default_out_changes_nothing_but_the_print():
    written, plain = Plan.parse("topk(keep=1.0, mode='mean', heads=none, sink=false)"), Plan.parse("topk()")
    assert written == plain and hash(written) == hash(plain)
    assert str(Plan.parse(str(written))) == str(written) != str(plain)


def test_numbers_of_different_kinds_are_different_plans():
    # 1 is one token, 1.0 all of them: equal in Python, but not the same plan
    assert str(Plan.parse("topk(keep=1)")) == "cache=topk(keep=1)"
    assert Plan.parse("topk(keep=1)") != Plan.parse("topk(keep=1.0)")
    assert str(Plan.parse("topk(keep=True)")) == "cache=topk(keep=True)"


def test_yaml_is_what_a_person_would_write():
    plan = Plan.parse("cache=window(size=3) vision=patches(ratio=0.25) cache=topk()")
    assert plan.to_yaml() == "cache:\n- window:\n    size: 3\n- topk\nvision:\n  patches:\n    ratio: 0.25\n"
    assert Plan.parse("vision=patches(pairs=(1, 2))").to_yaml() == "vision: patches(pairs=(1, 2))\n"
    assert Plan().to_yaml() == "{}\n"
    assert not Plan.from_yaml("{}\n") and not Plan.from_yaml("") and not Plan.parse("{}")


# ---- the forms -------------------------------------------------------------------------------------------------------


def test_all_forms_give_the_same_plan(toys, tmp_path):
    expected = Plan.parse("cache=topk(keep=0.5, mode='max') vision=patches()")
    instance = toys["topk"](keep=0.5, mode="max")
    yaml = "cache:\n  topk: {keep: 0.5, mode: max}\nvision: patches\n"
    path = tmp_path / "plan.yaml"
    path.write_text("# keep=0.5 was best\n" + yaml)
    forms = [
        Plan.parse("  topk(keep=0.5,\n  mode=max)\npatches\t"),
        Plan.parse('vision=patches cache=topk( keep = 0.5 , mode = "max" )'),
        Plan.parse(yaml),
        Plan(cache="topk(keep=0.5, mode=max)", vision="patches"),
        Plan(cache={"topk": {"keep": 0.5, "mode": "max"}}, vision={"patches": None}),
        Plan(cache={"topk": {"keep": 0.5, "mode": "max"}}, vision={"patches": {}}),
        Plan(cache=instance, vision=toys["patches"]()),
        Plan(cache=[instance], vision=("patches()",)),
        Plan((Step("cache", instance),), vision="patches()"),
        Plan.of({"cache": ["topk(keep=0.5, mode='max')"], "vision": ["patches"]}),
        Plan.of(expected),
        Plan.of(str(expected)),
        Plan.of(path),
        Plan.of(str(path)),
        Plan.from_yaml("'cache=topk(keep=0.5, mode=max) vision=patches'"),
        eval(repr(expected)),
    ]
    for plan in forms:
        assert plan == expected, plan
        assert hash(plan) == hash(expected)
    assert expected != str(expected)


def test_several_methods_at_a_stage_keep_their_order(toys):
    plan = Plan.parse("topk(keep=0.5) patches() window(size=2) topk()")
    assert [m.info.name for m in plan.at("cache")] == ["topk", "window", "topk"]
    assert plan.stages == ["vision", "cache"]
    assert [s.name for s in plan] == ["topk", "patches", "window", "topk"]
    assert (len(plan), bool(plan)) == (4, True)
    assert plan.at("text") == []
    assert plan == Plan.parse("patches() topk(keep=0.5) window(size=2) topk()")  # stages do not wait for one another
    assert plan != Plan.parse("patches() topk() window(size=2) topk(keep=0.5)")
    two = Plan(cache={"topk": {"keep": 0.5}, "window": {"size": 2}})
    assert [m.info.name for m in two.at("cache")] == ["topk", "window"]
    assert two.steps[0].params == {"keep": 0.5}


@pytest.mark.parametrize("nothing", [None, "", "  \n", "none", "baseline", {}, "{}"])
def test_the_empty_plan(nothing):
    plan = Plan.of(nothing)
    assert plan == Plan() and not plan and len(plan) == 0
    assert (str(plan), plan.stages, repr(plan)) == ("", [], "Plan.parse('')")


def test_bare_words_are_strings():
    def size(text):
        return Plan.parse(f"window(size={text})").at("cache")[0].size

    assert size("fast") == size("'fast'") == "fast"
    assert size("[fast, slow]") == ["fast", "slow"]
    assert (size("true"), size("False"), size("none"), size("inf"), size("-inf")) == (
        True,
        False,
        None,
        math.inf,
        -math.inf,
    )
    assert (size("'true'"), size("'nan'")) == ("true", "nan")
    assert size("{'a': (1, 2)}") == {"a": (1, 2)}
    assert size("'a) b(=\\' \"c'") == "a) b(=' \"c"


# ---- mistakes --------------------------------------------------------------------------------------------------------

BAD = [
    ("cash=topk()", "unknown stage 'cash': did you mean 'cache'?"),
    ("topkk(keep=0.5)", "unknown method 'topkk': did you mean 'topk'?"),
    ("cache=patches()", "patches is a method of stage 'vision', not 'cache': write vision=patches(...)"),
    ("cache=topk(kep=0.5)", "topk has no parameter 'kep': did you mean 'keep'?"),
    ("cache=window", "window needs the parameter 'size'"),
    ("cache=topk(keep=0.5", "not closed"),
    ("cache=topk keep=0.5)", "not closed"),
    ("cache=topk(mode='max)", "not closed"),
    ("cache=topk)(", "cannot read"),
    ("cache=topk(0.5)", "the parameters of topk must be named"),
    ("cache=topk(**x)", "the parameters of topk must be named"),
    ("cache=topk(keep=0.5, keep=0.7)", "given twice"),
    ("cache=topk(keep=)", "cannot read"),
    ("cache=", "cannot read"),
    ("=", "unknown stage ''"),
    ("cache=3", "cannot read '3'"),
    ("cache=a.b()", "cannot read"),
    ("cache=topk()()", "cannot read"),
    ("topk(keep=\0)", "cannot read"),
    ("cache=topk(keep=" + "[" * 5000 + "]" * 5000 + ")", "cannot read"),
    ("cache=topk(keep=" + "-" * 5000 + "1)", "cannot read"),
    ("cache=topk(keep=" + "-" * 1500 + "1)", "cannot read"),
    ("cache=topk(keep=1+2j)", "cannot read the value '1+2j'"),
    ("cache=topk(keep=...)", "cannot read the value '...'"),
    ("cache=topk(keep={[1]: 2})", "cannot read the value"),
    ("cache=topk(keep={1, 2})", "cannot read the value"),
    ("cache=topk(keep={**x})", "cannot read the value"),
    ("cache=topk(keep=b'x')", "cannot read the value"),
    ("cache=topk(keep=-'x')", "cannot read the value"),
    ("cache=topk(keep=__import__('os').system('true'))", "cannot read the value"),
    ("cache=topk(keep=open('x'))", "cannot read the value"),
    ("cache=topk(keep=[i for i in x])", "cannot read the value"),
    ("cache=topk(keep=(lambda: 1)())", "cannot read the value"),
    ("cache=topk(mode=f'{1}')", "cannot read the value"),
    ("__import__('os')", "must be named"),
    ("cache=__import__(name='os')", "unknown method '__import__'"),
    ("cache: [topk", "not valid YAML"),
    ("cache: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ("cache: {topk: 5}", "the parameters of topk must be named"),
    ("cache: {topk: {1: 2}}", "topk has no parameter '1'"),
    ("cache: 5", "cannot read 5 at stage 'cache'"),
    ("cache:", "cannot read None at stage 'cache'"),
    ("cache: [{topk: {}, window: {}}]", "cannot read {"),
    ("5: topk", "unknown stage '5'"),
    ("cache=topk(\n  keep=\n", "not closed"),
    ("cache=topk(\n  keep=f(\n))", "cannot read the value 'f( )'"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text[:40] for text, _ in BAD])
def test_mistakes_are_one_line(text, message):
    with pytest.raises(ThriftError) as error:
        Plan.parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("yaml", ["5", "[topk]", "- topk\n- window", "true", "2026-01-01"])
def test_yaml_that_is_no_plan(yaml):
    with pytest.raises(ThriftError, match="a plan is text, a mapping or a YAML file"):
        Plan.from_yaml(yaml)


def test_objects_that_are_no_plan(toys):
    for wrong in (5, ["topk"], object()):
        with pytest.raises(ThriftError, match="a plan is text"):
            Plan.of(wrong)
    with pytest.raises(ThriftError, match="cannot read"):
        Plan("cache=topk()")
    with pytest.raises(ThriftError, match="topk is a method of stage 'cache', not 'vision'"):
        Plan(vision=toys["topk"]())
    with pytest.raises(ThriftError, match="cannot read"):
        Plan(cache=toys["topk"])  # the class, not an instance


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "self.yaml").write_text("self.yaml")
    for path in ("missing.yaml", tmp_path / "missing.yaml", tmp_path, "binary.yml"):
        with pytest.raises(ThriftError, match="cannot read the plan file") as error:
            Plan.of(path)
        assert "\n" not in str(error.value)
    with pytest.raises(ThriftError, match=r"cannot read 'self\.yaml'"):
        Plan.of("self.yaml")


def test_steps_are_frozen(toys):
    step = Plan.parse("topk()").steps[0]
    with pytest.raises(AttributeError):
        step.stage = "vision"
    with pytest.raises(AttributeError):
        step.method.keep = 0.5
