"""The official client sees what it would see without the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

pytest.importorskip("starlette", reason="needs the extra: serve")
pytest.importorskip("uvicorn", reason="needs the extra: serve")
pytest.importorskip("openai", reason="the official client")

import openai

from .serving import LONG, STREAM_HEAD, Running, chunk, framed, running

CHAT = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "."}, {"role": "user", "content": "?"}]
WORDS = ["One ", "two ", "three."]


@pytest.fixture(scope="module")
def gateway() -> Iterator[Running]:
    with running() as one:
        yield one


@pytest.fixture(scope="module")
def client(gateway: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.base_url}/v1", api_key="sk-x", max_retries=0, timeout=20) as one:
        yield one


def streams(gateway: Running, complete: bool) -> None:
    async def behave(writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD)
        for word in WORDS:
            writer.write(framed(chunk(word)))
            await writer.drain()
        if complete:
            writer.write(framed(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        else:
            writer.write(framed(chunk("never")[:30]))
            await writer.drain()
            writer.transport.abort()

    gateway.upstream.behave = behave


def test_not_streamed(gateway: Running, client: openai.OpenAI) -> None:
    gateway.upstream.behave = None
    got = client.chat.completions.with_raw_response.create(model="m", messages=CHAT)
    assert got.parse().choices[0].message.content == "Hello."
    assert int(got.headers["x-tokenthrift-tokens-saved"]) == len(LONG) - len(LONG) // 2
    assert gateway.sent["messages"][0]["content"] == LONG[: len(LONG) // 2]
    assert gateway.upstream.seen[-1].headers["authorization"] == "Bearer sk-x"


def test_streamed(gateway: Running, client: openai.OpenAI) -> None:
    streams(gateway, complete=True)
    with client.chat.completions.create(model="m", messages=CHAT, stream=True) as stream:
        assert [event.choices[0].delta.content for event in stream] == WORDS


def test_an_upstream_that_dies_in_a_stream(gateway: Running, client: openai.OpenAI) -> None:
    streams(gateway, complete=False)
    got = []
    with (
        pytest.raises(openai.APIError, match="the upstream broke off"),
        client.chat.completions.create(model="m", messages=CHAT, stream=True) as stream,
    ):
        for event in stream:
            got.append(event.choices[0].delta.content)
    assert got == WORDS
    test_streamed(gateway, client)


def test_errors_of_the_gateway_are_the_client_s_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="'messages' has 10,000 entries") as error:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}] * 10_000)
    assert error.value.code == "too_many_messages"
    with pytest.raises(openai.APIStatusError, match="8 MB") as error:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 50_000_000}])
    assert error.value.status_code == 413
