"""Requests and answers pass through the gateway as they are, and nowhere but to the upstream."""

from __future__ import annotations

import asyncio
import gzip
import logging
import socket
from collections.abc import Iterator

import pytest

pytest.importorskip("starlette", reason="needs the extra: serve")
pytest.importorskip("uvicorn", reason="needs the extra: serve")

import httpx

from .serving import KEY, LONG, STREAM_HEAD, Running, answer, chunk, completion, framed, running, until


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as one:
        yield one


@pytest.fixture
def gateway(server: Running) -> Iterator[Running]:
    server.upstream.seen.clear()
    server.upstream.left.clear()
    yield server
    server.upstream.behave = None


def raw(gateway: Running, request: bytes) -> bytes:
    """The answer to bytes that no client library would send."""
    with socket.create_connection(("127.0.0.1", int(gateway.base_url.rpartition(":")[2])), timeout=10) as line:
        line.sendall(request)
        received = b""
        while piece := line.recv(65536):
            received += piece
        return received


def test_a_request_and_its_answer_keep_their_bytes(gateway: Running) -> None:
    body = b'{"model": "m",  "messages": [ {"role": "user", "content": "h\\u00e9 \xc3\xa9"} ], "x": 1.0e0}'
    headers = {"content-type": "application/json; charset=utf-8", "authorization": f"Bearer {KEY}", "x-extra": "a"}
    got = gateway.client.post("/v1/chat/completions?api-version=1&b=%20c", content=body, headers=headers)
    assert got.content == completion()
    assert (got.status_code, got.headers["x-tokenthrift"]) == (200, "unchanged")
    (seen,) = gateway.upstream.seen
    assert seen.body == body
    assert seen.line == "POST /base/v1/chat/completions?api-version=1&b=%20c HTTP/1.1"
    assert seen.headers["authorization"] == f"Bearer {KEY}"
    assert seen.headers["x-extra"] == "a"
    assert seen.headers["host"] == f"127.0.0.1:{gateway.upstream.port}"


def test_other_paths_and_statuses_pass_through(gateway: Running) -> None:
    async def behave(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b'{"error": "as it was"}', "429 Too Many Requests", retry_after="7", x_request_id="r1"))

    gateway.upstream.behave = behave
    got = gateway.client.get("/v1/models/org%2Fname")
    assert (got.status_code, got.content) == (429, b'{"error": "as it was"}')
    assert (got.headers["retry-after"], got.headers["x-request-id"]) == ("7", "r1")
    assert gateway.upstream.seen[-1].line == "GET /base/v1/models/org%2Fname HTTP/1.1"
    gateway.client.post("/v1/files", content=b"\0\1not json", headers={"content-type": "application/octet-stream"})
    assert gateway.upstream.seen[-1].body == b"\0\1not json"


def test_compressed_answers_stay_compressed(gateway: Running) -> None:
    packed = gzip.compress(completion())

    async def behave(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(packed, content_encoding="gzip"))

    gateway.upstream.behave = behave
    with gateway.client.stream("GET", "/v1/models", headers={"accept-encoding": "gzip"}) as got:
        assert b"".join(got.iter_raw()) == packed
    assert gateway.upstream.seen[-1].headers["accept-encoding"] == "gzip"
    raw(gateway, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert gateway.upstream.seen[-1].headers["accept-encoding"] == "identity"


def test_headers_of_the_connection_stay_behind(gateway: Running) -> None:
    headers = {"connection": "keep-alive, x-hop", "x-hop": "1", "te": "trailers", "x-tokenthrift-anything": "1"}
    got = gateway.client.get("/v1/models", headers=headers)
    assert not {"x-hop", "te", "x-tokenthrift-anything", "upgrade"} & set(gateway.upstream.seen[-1].headers)
    assert len(got.headers.get_list("date")) <= 1


def test_a_stream_comes_as_it_is_and_when_it_is_there(gateway: Running) -> None:
    pieces = [
        b": a comment\r\n\r\n",
        chunk("one"),
        b"event: x\rdata: 1\r\r",
        chunk("two")[:9],
        chunk("two")[9:],
        b"rest",
    ]
    go_on = asyncio.Event()

    async def behave(writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + framed(pieces[0] + pieces[1]))
        await writer.drain()
        await go_on.wait()
        for piece in pieces[2:]:
            writer.write(framed(piece))
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.write(b"0\r\n\r\n")

    gateway.upstream.behave = behave
    got = b""
    with gateway.client.stream("POST", "/v1/chat/completions", json={"model": "m", "stream": True}) as stream:
        assert stream.headers["x-up"] == "1"
        for piece in stream.iter_raw():
            got += piece
            if got == pieces[0] + pieces[1]:  # it is here, though the upstream has not gone on
                go_on._loop.call_soon_threadsafe(go_on.set)  # type: ignore[attr-defined]
    assert got == b"".join(pieces)


def test_an_upstream_that_dies_in_a_stream_ends_it_with_an_error(gateway: Running) -> None:
    async def behave(writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + framed(chunk("one")) + framed(chunk("two")[:20]))
        await writer.drain()
        writer.transport.abort()

    gateway.upstream.behave = behave
    got = gateway.chat("hi", stream=True)
    assert got.content.startswith(chunk("one") + b'data: {"error": {"message": "the upstream broke off')
    assert got.content.endswith(b"}\n\n")
    gateway.upstream.behave = None
    assert gateway.chat("hi").status_code == 200


@pytest.mark.parametrize(
    "head", [b"", b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"]
)
def test_an_upstream_that_dies_before_its_answer_is_complete(gateway: Running, head: bytes) -> None:
    async def behave(writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        await writer.drain()
        writer.transport.abort()

    gateway.upstream.behave = behave
    got = gateway.chat("hi")
    assert got.status_code == 502
    assert got.json()["error"]["type"] == "gateway_error"


def test_another_answer_that_breaks_off_breaks_off_for_the_client(gateway: Running) -> None:
    async def behave(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"abc", content_type="audio/wav", content_length="99"))
        await writer.drain()
        writer.transport.abort()

    gateway.upstream.behave = behave
    with pytest.raises(httpx.RemoteProtocolError):
        gateway.client.get("/v1/audio")
    gateway.upstream.behave = None
    assert gateway.chat("hi").status_code == 200


def test_redirects_are_not_followed(gateway: Running) -> None:
    async def behave(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"", "307 Temporary Redirect", location="http://169.254.169.254/latest"))

    gateway.upstream.behave = behave
    got = gateway.chat("hi")
    assert (got.status_code, got.json()["error"]["code"]) == (502, "upstream_redirect")
    assert "location" not in got.headers
    assert len(gateway.upstream.seen) == 1


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://evil.example/v1/models", 200),  # the server takes the path out of an absolute address
        (b"//evil.example/v1/models", 404),
        (b"/v1@evil.example/models", 404),
        (b"/v1/../admin", 400),
        (b"/v1/..%2f..%2fadmin", 400),
        (b"/v1/%2e%2e/admin", 400),
        (b"/v1/%252e%252e/admin", 400),
        (b"/v1/..\\admin", 400),
        (b"/v1/a%00b", 400),
        (b"/v1/a%0d%0aHost:%20evil", 404),
        (b"/v2/models", 404),
        (b"/metrics/../v1", 404),
    ],
)
def test_nothing_but_the_upstream_is_ever_reached(gateway: Running, target: bytes, status: int) -> None:
    got = raw(gateway, b"GET " + target + b" HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
    allowed = {f"HTTP/1.1 {status}".encode(), b"HTTP/1.1 400"}  # uvicorn itself may refuse the line
    assert got[:12] in allowed
    assert all(seen.line.split()[1].startswith("/base/v1") for seen in gateway.upstream.seen)
    assert b"evil" not in b"".join(seen.line.encode() for seen in gateway.upstream.seen)


def test_work_for_a_client_that_left_ends(gateway: Running) -> None:
    async def behave(writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + framed(chunk("one")))
        await writer.drain()
        for _ in range(500):  # until the gateway closes the connection
            await asyncio.sleep(0.01)
            writer.write(framed(b": still here\n\n"))
            await writer.drain()

    gateway.upstream.behave = behave
    with gateway.client.stream("POST", "/v1/chat/completions", json={"model": "m", "stream": True}) as stream:
        next(stream.iter_raw())
    until(gateway.upstream.left.is_set, 4)


def test_nothing_secret_is_logged(gateway: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    gateway.chat("BROKEN " + LONG, {"role": "assistant", "content": "."}, "a question")
    gateway.client.get(f"/v1/models?key={KEY}", headers={"authorization": KEY, "cookie": KEY})
    until(lambda: len([r for r in caplog.records if r.name == "tokenthrift.gateway"]) >= 3)
    logged = "\n".join(r.getMessage() for r in caplog.records if r.name != "httpx")  # that is the test's own client
    assert "failed-open" in logged
    assert KEY not in logged
    assert "quick brown" not in logged
