"""Schedules of removals against the authors' numbers, from files, and as a share of the tokens."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenthrift import ThriftError, View
from tokenthrift.ops.schedules import check_removal, parse_r, to_remove

GOLDEN = Path(__file__).parents[1] / "golden" / "vision" / "tome_parse_r.npz"


@pytest.mark.parametrize(
    ("case", "layers", "r"),
    [
        ("case0", 12, 8),
        ("case1", 12, (8, -1.0)),
        ("case2", 24, (7, 0.5)),
        ("case3", 12, [4, 4, 2]),
        ("case4", 12, (16, -1.0)),
    ],
)
def test_schedules_are_the_official_ones(case, layers, r):
    assert parse_r(r, layers) == np.load(GOLDEN)[case].tolist()


def test_a_ramp_over_one_layer_and_a_list_that_is_too_long():
    assert parse_r((8, -1.0), 1) == [16]
    assert parse_r([3, 2, 0, 0], 2) == [3, 2]
    with pytest.raises(ThriftError, match=r"3 layers, but only 2 can remove tokens: shorten"):
        parse_r([3, 2, 1], 2)


@pytest.mark.parametrize("r", [2**63, (10**400, 0.5), [10**30]])
def test_numbers_that_no_tensor_can_hold(r):
    with pytest.raises(ThriftError, match="no number of tokens"):
        check_removal("tome", 0.5, r, 0.5)


def test_a_file_nested_too_deep_is_refused(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ThriftError, match="holds no JSON"):
        check_removal("tome", 0.5, str(path), 0.5)


@pytest.mark.parametrize("held", [[4, 4, 2], {"r": [4, 4, 2]}])
def test_a_schedule_from_a_file(tmp_path, held):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(held))
    assert parse_r(str(path), 5) == [4, 4, 2, 0, 0]
    assert check_removal("tome", 0.5, str(path), 0.5) == str(path)  # a plan prints the path, not what is in it


def test_a_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text("[4]")
    assert parse_r(str(path), 1) == [4]
    path.write_text("[5]")
    os.utime(path, ns=(1, 1))
    assert parse_r(str(path), 1) == [5]


@pytest.mark.parametrize("held", ["8", "[4, -1]", "[4.5]", "[true]", '{"keep": [4]}', '{"r": 8}', '"8"', "null"])
def test_a_file_without_a_schedule_is_refused(tmp_path, held):
    path = tmp_path / "schedule.json"
    path.write_text(held)
    with pytest.raises(ThriftError, match=r"must hold one count a layer: write \[16, 8, 4\]"):
        parse_r(str(path), 4)


def test_a_file_that_is_missing_or_no_json_is_refused(tmp_path):
    with pytest.raises(ThriftError, match=r"missing.json' is no file with a schedule \(No such file"):
        parse_r(str(tmp_path / "missing.json"), 4)
    with pytest.raises(ThriftError, match="is no file with a schedule"):
        parse_r(str(tmp_path), 4)  # a folder
    (tmp_path / "a.json").write_bytes(b"\xff[4")
    with pytest.raises(ThriftError, match=r"\(it holds no JSON\): write r=8"):
        parse_r(str(tmp_path / "a.json"), 4)


def test_a_ramp_from_yaml_becomes_a_tuple():
    assert check_removal("tome", 0.5, [8, -1.0], 0.5) == (8, -1.0)
    assert check_removal("tome", 0.5, [8, 1], 0.5) == [8, 1]
    assert check_removal("tome", 0.25, None, 0.5) is None


def test_the_errors_name_the_method():
    with pytest.raises(ThriftError, match=r"^pitome keep=1\.5 is not a share in \(0, 1\]"):
        check_removal("pitome", 1.5, None, 0.5)
    with pytest.raises(ThriftError, match=r"^pitome takes .* not both"):
        check_removal("pitome", 0.25, 8, 0.5)


@given(start=st.integers(1, 60), prefix=st.integers(0, 4), layers=st.integers(1, 12), keep=st.floats(0.01, 1))
def test_the_share_is_reached_in_equal_steps_by_images_and_texts_alike(start, prefix, layers, keep):
    tokens, steps = start, []
    for layer in range(layers):
        known = {"features": torch.zeros(1, tokens + prefix, 1), "layer": layer, "layers": layers, "prefix": prefix}
        step = to_remove(View(**known, grid=(1, 1, start)), keep, None)
        assert step == to_remove(View(**known, tokens=start + prefix), keep, None)
        steps.append(step)
        tokens -= step
    assert tokens == max(int(keep * start + 0.5), 1)
    assert max(steps) - min(steps) <= 1
