"""In front of a real server with a real model, driven with the official client: what a user of the gateway has."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import httpx
import pytest
import yaml

pytest.importorskip("starlette", reason="needs the extra: serve")
pytest.importorskip("fastapi", reason="needs transformers[serving]")
pytest.importorskip("openai", reason="the official client")

import openai

from tokenthrift.models.packs import pack_path

pytestmark = pytest.mark.slow

TEXT = "The committee met on Tuesday to discuss the budget for the new library in the old town. " * 40


class Servers(NamedTuple):
    upstream: subprocess.Popen[bytes]
    direct: openai.OpenAI
    through: openai.OpenAI
    page: str


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    upstream_port, port = free_port(), free_port()
    with ExitStack() as stack:

        def start(entry: str, *arguments: object) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-c", entry, "serve", *map(str, arguments)]
            environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "no_proxy": "*", "HF_HUB_OFFLINE": "1"}
            process = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
            )
            stack.callback(process.terminate)
            return process

        behind = f"http://127.0.0.1:{upstream_port}"
        upstream = start(
            "from transformers.cli.transformers import main; main()", pack_path("smollm2-135m"), "--port", upstream_port
        )
        wait_for(f"{behind}/v1/models")
        policy = {"upstream": f"{behind}/v1", "routes": [{"method": "word_head", "time_budget": 60}]}
        (file := tmp_path_factory.mktemp("policy") / "policy.yaml").write_text(yaml.safe_dump(policy))
        start("from tokenthrift.cli.main import run; run()", "--policy", file, "--port", port)
        wait_for(f"http://127.0.0.1:{port}/health", "ready")
        clients = [
            stack.enter_context(openai.OpenAI(base_url=f"{base}/v1", api_key="sk-x", max_retries=0, timeout=300))
            for base in (behind, f"http://127.0.0.1:{port}")
        ]
        yield Servers(upstream, *clients, f"http://127.0.0.1:{port}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def wait_for(url: str, said: str = "") -> None:
    for _ in range(1200):
        try:
            got = httpx.get(url, trust_env=False)
            if got.status_code == 200 and said in got.text:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"nothing answers at {url}")


def asked(text: str) -> dict[str, object]:
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
    return {
        "model": str(pack_path("smollm2-135m")),
        "messages": [*chat, {"role": "user", "content": "When did they meet?"}],
        "max_tokens": 8,
        "temperature": 0,
    }


def test_the_answer_is_the_server_s(servers: Servers) -> None:
    short = asked("They met on Tuesday.")  # too short to be shortened
    answers = [
        client.chat.completions.create(**short).choices[0].message.content
        for client in (servers.direct, servers.through)
    ]
    assert answers[0]
    assert answers[0] == answers[1]


def test_a_stream_is_the_server_s(servers: Servers) -> None:
    said = []
    for client in (servers.direct, servers.through):
        with client.chat.completions.create(**asked("They met on Tuesday."), stream=True) as stream:
            said.append("".join(event.choices[0].delta.content or "" for event in stream if event.choices))
    assert said[0]
    assert said[0] == said[1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_long_prompt_arrives_shortened(servers: Servers, stream: bool) -> None:
    plain = servers.direct.chat.completions.create(**asked(TEXT)).usage.prompt_tokens
    got = servers.through.chat.completions.with_raw_response.create(
        **asked(TEXT), stream=stream, **({"stream_options": {"include_usage": True}} if stream else {})
    )
    answer = got.parse()
    usage = next(event.usage for event in answer if event.usage) if stream else answer.usage
    saved = int(got.headers["x-tokenthrift-tokens-saved"])
    assert saved > 100
    assert plain - usage.prompt_tokens == pytest.approx(saved, rel=0.1)


def test_a_server_that_is_killed_in_a_stream(servers: Servers) -> None:
    request = {**asked("They met on Tuesday."), "max_tokens": 400}
    with (
        pytest.raises(openai.APIError, match="upstream"),
        servers.through.chat.completions.create(**request, stream=True) as stream,
    ):
        for i, _ in enumerate(stream):
            if i == 3:
                servers.upstream.kill()
    with pytest.raises(openai.APIStatusError) as error:
        servers.through.chat.completions.create(**request)
    assert error.value.status_code == 502
    assert httpx.get(f"{servers.page}/health", trust_env=False).json()["status"] == "ok"
