"""`tokenthrift serve`: its options, a real server in a process of its own, and mistakes as one line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from tokenthrift.cli.serve import serve
from tokenthrift.core.errors import ThriftError

app = typer.Typer()
app.command()(serve)


def run(*arguments: Any) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if isinstance(result.exception, ThriftError):
        raise result.exception
    return result


def test_check_says_what_the_policy_does(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("upstream: http://a/v1\nroutes: [{path: /v1/chat/*, method: truncate, rate: 0.3}]\n")
    shown = run("--policy", file, "--check")
    assert "1-truncate: /v1/chat/*, model *: truncate at rate 0.3, within 1 s" in shown.stdout
    read = json.loads(run("--policy", file, "--upstream", "http://b/v1", "--check", "--json").stdout)
    assert (read["upstream"], read["routes"][0]["rate"], read["limits"]["messages"]) == ("http://b/v1", 0.3, 2000)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name the server behind the gateway"),
        (("--policy", "/none.yaml"), "there is no file /none.yaml"),
        (("--policy", "/none.yaml", "--method", "truncate"), "--method is for use without --policy"),
        (("--upstream", "a"), "write an address"),
        (("--upstream", "http://a", "--method", "trunc"), "did you mean 'truncate'"),
        (("--upstream", "http://a", "--method", "truncate", "--rate", "2"), "outside"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ThriftError, match=said):
        run(*arguments)


def test_a_port_that_is_taken() -> None:
    pytest.importorskip("starlette", reason="needs the extra: serve")
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ThriftError, match="cannot listen on"),
    ):
        run("--upstream", "http://a/v1", "--port", taken.getsockname()[1])


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in [name for name in sys.modules if name.startswith("tokenthrift.integrations.gateway.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("tokenthrift.integrations.gateway.server", raising=False)
    with pytest.raises(ThriftError, match=r"pip install 'tokenthrift\[serve\]'"):
        run("--upstream", "http://a/v1", "--port", 0)


def test_it_serves_and_stops() -> None:
    pytest.importorskip("starlette", reason="needs the extra: serve")
    code = "from tokenthrift.cli.main import run; run()"
    command = [sys.executable, "-c", code, "serve", "--upstream", "http://127.0.0.1:9/v1", "--port", "0", "--json"]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "no_proxy": "*"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline())
            with urllib.request.urlopen(said["page"] + "health", timeout=10) as got:
                assert json.load(got)["status"] == "ok"
        finally:
            process.terminate()
        _, errors = process.communicate(timeout=20)
        assert b"Traceback" not in errors


def test_help_loads_no_torch_and_no_server() -> None:
    code = (
        "import sys, tokenthrift.cli.serve, tokenthrift.integrations.gateway.policy as p; p.Policy('http://a')\n"
        "assert not {'torch', 'transformers', 'starlette', 'uvicorn', 'httpx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
