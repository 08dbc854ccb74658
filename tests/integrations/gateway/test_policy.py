"""The policy file: what it says, and what is told of its mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tokenthrift.core.errors import ThriftError
from tokenthrift.integrations.gateway.policy import Policy, Route

POLICY = """
upstream: https://api.example.org/v1
routes:
  - {path: /v1/chat/*, model: "gpt-4*", method: truncate, rate: 0.4, params: {where: tail}, roles: [user, tool]}
  - {path: /v1/*, name: rest}
prices: {"gpt-4o-mini*": 0.15, "gpt-4*": 2.5}
limits: {body_mb: 2, concurrent: 9}
"""


def test_a_policy_file(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY, encoding="utf-8")
    policy = Policy.load(file)
    first, rest = policy.routes
    assert (first.name, first.method, first.rate, first.roles) == ("1-truncate", "truncate", 0.4, ("user", "tool"))
    assert policy.route("/v1/chat/completions", "gpt-4o") is first
    assert policy.route("/v1/chat/completions", "o3") is rest
    assert policy.route("/v2", "o3") is None
    assert policy.price("gpt-4o-mini-2024") == pytest.approx(0.15e-6)
    assert policy.price("gpt-4o") == pytest.approx(2.5e-6)
    assert policy.price("o3") is None
    assert (policy.limits.body_mb, policy.limits.concurrent, policy.limits.messages) == (2, 9, 2000)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "not a mapping"),
        ({}, "names no upstream"),
        ({"upstream": "api.example.org"}, "write an address"),
        ({"upstream": "ftp://a/v1"}, "write an address"),
        ({"upstream": "http://a:99999/v1"}, "write an address"),
        ({"upstream": 5}, "write an address"),
        ({"upstream": "http://me:key@a/v1"}, "no user"),
        ({"upstream": "http://a/v1?key=1"}, "query"),
        ({"upstream": "http://a", "rutes": []}, "did you mean 'routes'"),
        ({"upstream": "http://a", "workers": 0}, "workers is 0"),
        ({"upstream": "http://a", "workers": 2, "processes": False}, "threads share one tokenizer"),
        ({"upstream": "http://a", "page": "yes"}, "write true or false"),
        ({"upstream": "http://a", "prices": {"m": "cheap"}}, "prices: m is 'cheap'"),
        ({"upstream": "http://a", "prices": [1]}, "prices is list"),
        ({"upstream": "http://a", "limits": {"body_mb": 0}}, "limits: body_mb is 0"),
        ({"upstream": "http://a", "limits": {"messages": 1.5}}, "limits: messages is 1.5"),
        ({"upstream": "http://a", "limits": {"seconds": float("nan")}}, "limits: seconds is nan"),
        ({"upstream": "http://a", "routes": {}, "limits": {"mb": 1}}, "limits has no 'mb'"),
        ({"upstream": "http://a", "routes": {"a": 1}}, "routes must be a list"),
    ],
)
def test_mistakes(data: Any, said: str) -> None:
    with pytest.raises(ThriftError, match=said) as error:
        Policy.of(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("route", "said"),
    [
        ({"method": "trunc"}, "route 1: unknown method 'trunc'.*did you mean 'truncate'"),
        ({"method": ["truncate"]}, "write the name of one text method"),
        ({"method": "truncate", "rate": 0}, "route 1: budget 0 keeps nothing"),
        ({"method": "truncate", "rate": 1.5}, "outside"),
        ({"method": "truncate", "params": {"were": "head"}}, "did you mean 'where'"),
        ({"method": "truncate", "params": [1]}, "params must be a mapping"),
        ({"method": "truncate", "protect": "cod"}, "route 1: protect"),
        ({"metod": "truncate"}, "did you mean 'method'"),
        ({"roles": ["system"]}, "the roles that can be shortened are"),
        ({"roles": "user"}, "write a list"),
        ({"last_user": 1}, "write true or false"),
        ({"question": "yes"}, "write last_user"),
        ({"time_budget": 0}, "time_budget is 0"),
        ({"min_chars": -1}, "min_chars is -1"),
        ({"path": 5}, "path is 5"),
    ],
)
def test_mistakes_of_a_route(route: dict[str, Any], said: str) -> None:
    with pytest.raises(ThriftError, match=said):
        Policy.of({"upstream": "http://a", "routes": [route]})


def test_two_routes_of_one_name() -> None:
    with pytest.raises(ThriftError, match="two routes are called 'a'"):
        Policy("http://a", (Route(name="a"), Route(name="a")))


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("a: [1\nb: 2", encoding="utf-8")
    with pytest.raises(ThriftError, match=r"is no YAML \(line 2\)"):
        Policy.load(file)
    with pytest.raises(ThriftError, match="there is no file"):
        Policy.load(tmp_path / "none.yaml")
    file.write_text("upstream: x", encoding="utf-8")
    with pytest.raises(ThriftError, match=r"policy\.yaml: upstream is 'x'"):
        Policy.load(file)
