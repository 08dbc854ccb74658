"""What the gateway does to prompts: by policy, within the time budget, and never at the cost of a request."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra: serve")
pytest.importorskip("uvicorn", reason="needs the extra: serve")

import httpx

from .serving import LONG, Running, running

REPLY = {"role": "assistant", "content": LONG}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    limits = {"body_mb": 0.2, "messages": 50, "concurrent": 20, "body_seconds": 1}
    with running(limits=limits, prices={"m-free*": 0, "m*": 2.0}) as one:
        yield one


@pytest.fixture
def gateway(server: Running) -> Running:
    server.upstream.seen.clear()
    return server


def contents(gateway: Running) -> list[Any]:
    return [m.get("content") for m in gateway.sent["messages"]]


def test_earlier_turns_are_shortened_and_counted(gateway: Running) -> None:
    got = gateway.chat({"role": "system", "content": LONG}, LONG, REPLY, LONG, temperature=0.5, tools=[{"x": LONG}])
    half = LONG[: len(LONG) // 2]
    assert contents(gateway) == [LONG, half, LONG, LONG]
    assert gateway.sent["tools"] == [{"x": LONG}]
    assert gateway.sent["temperature"] == 0.5
    saved = len(LONG) - len(half)
    assert got.headers["x-tokenthrift"] == "compressed"
    assert got.headers["x-tokenthrift-tokens-before"] == str(len(LONG))
    assert got.headers["x-tokenthrift-tokens-after"] == str(len(half))
    assert got.headers["x-tokenthrift-tokens-saved"] == str(saved)
    assert float(got.headers["x-tokenthrift-saved-usd"]) == pytest.approx(saved * 2e-6)
    assert float(got.headers["x-tokenthrift-ms"]) > 0


def test_a_history_keeps_its_bytes_from_turn_to_turn(gateway: Running) -> None:
    first, second = "first " + LONG, "second " + LONG
    gateway.chat(first, REPLY, second)
    before = contents(gateway)
    gateway.chat(first, REPLY, second, REPLY, "third")
    assert contents(gateway)[:2] == before[:2]
    assert contents(gateway)[2] == second[: round(len(second) / 2)]


@pytest.mark.parametrize(
    ("word", "reason"), [("SLOW", "timeout"), ("BROKEN", "error")], ids=["slower than its budget", "failing"]
)
def test_a_request_goes_out_unchanged_when_shortening_fails(gateway: Running, word: str, reason: str) -> None:
    prompt = word + str(time.time()) + LONG  # never seen before
    got = gateway.chat(prompt, REPLY, LONG)
    assert got.status_code == 200
    assert (got.headers["x-tokenthrift"], got.headers["x-tokenthrift-reason"]) == ("failed-open", reason)
    assert "x-tokenthrift-tokens-saved" not in got.headers
    assert contents(gateway) == [prompt, LONG, LONG]
    if word == "SLOW":  # it was computed in the end, so the next turn has it
        time.sleep(0.7)
        assert gateway.chat(prompt, REPLY, LONG).headers["x-tokenthrift"] == "compressed"


@pytest.mark.parametrize(
    ("prompt", "headers", "reason"),
    [
        ("GROWS " + LONG, {}, "not-smaller"),
        ("short", {}, "nothing-to-shorten"),
        (LONG, {"x-tokenthrift": "off"}, "asked"),
    ],
)
def test_unchanged_requests_keep_their_bytes(
    gateway: Running, prompt: str, headers: dict[str, str], reason: str
) -> None:
    body = b'{ "model":"m", "messages":[{"role":"user","content":"%s"},  {"role":"user2"},' % prompt.encode()
    body += b'{"role":"user","content":"?"}]}'
    typed = {"content-type": "application/json", **headers}
    got = gateway.client.post("/v1/chat/completions", content=body, headers=typed)
    assert (got.headers["x-tokenthrift"], got.headers["x-tokenthrift-reason"]) == ("unchanged", reason)
    assert gateway.upstream.seen[-1].body == body


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"{", {}, 400, "bad_json"),
        (b"\xff\xfe", {}, 400, "bad_json"),
        (b"[" * 100_000, {}, 400, "bad_json"),
        (b'{"a": NaN}', {}, 400, "bad_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", {}, 400, "bad_json"),
        (b"[]", {}, 400, "bad_json"),
        (b"", {}, 400, "bad_json"),
        (b"{}", {"content-type": "text/plain"}, 415, "bad_content_type"),
        (b"{}", {"content-type": ""}, 415, "bad_content_type"),
        (b"x" * 200_001, {}, 413, "body_too_long"),
        (b"x" * 50_000_000, {}, 413, "body_too_long"),
        (b'{"messages": [' + b"1.5," * 50 + b"{}]}", {}, 400, "too_many_messages"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_bad_requests(gateway: Running, body: bytes, headers: dict[str, str], status: int, code: str) -> None:
    typed = {"content-type": "application/json", **headers}
    got = gateway.client.post("/v1/chat/completions", content=body, headers=typed)
    assert got.status_code == status
    error = got.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert set(error) == {"message", "type", "code", "param"}
    assert not gateway.upstream.seen


@pytest.mark.parametrize("expect", [b"Expect: 100-continue\r\n", b""])
def test_a_body_that_is_far_too_long_is_not_even_read(gateway: Running, expect: bytes) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 900000000\r\n" + expect + b"\r\n"
    with socket.create_connection(("127.0.0.1", int(gateway.base_url.rpartition(":")[2])), timeout=10) as line:
        line.sendall(head)
        received = b""
        while piece := line.recv(65536):  # until the gateway closes the connection
            received += piece
    assert received.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "messages",
    ["a string", [1, None, "x", []], [{"role": ["user"], "content": 5}], [{"role": "user", "content": [{"type": 1}]}]],
)
def test_odd_messages_are_the_upstream_s_to_judge(gateway: Running, messages: Any) -> None:
    got = gateway.client.post("/v1/chat/completions", json={"messages": messages, "model": 5})
    assert got.status_code == 200
    assert gateway.sent["messages"] == messages


def test_lone_surrogates_and_numbers_without_end(gateway: Running) -> None:
    typed = {"content-type": "application/json"}
    body = b'{"messages":[{"role":"user","content":"\\ud800%s"},{"role":"assistant"},{"role":"user"}]%s}'
    got = gateway.client.post("/v1/chat/completions", content=body % (LONG.encode(), b""), headers=typed)
    assert got.headers["x-tokenthrift"] == "compressed"
    assert b'"\\ud800The quick' in gateway.upstream.seen[-1].body
    endless = body % (b"other " + LONG.encode(), b',"x":1e999')
    got = gateway.client.post("/v1/chat/completions", content=endless, headers=typed)
    assert got.headers["x-tokenthrift-reason"] == "error"
    assert gateway.upstream.seen[-1].body == endless


def test_own_pages(gateway: Running) -> None:
    gateway.chat("pages " + LONG, REPLY, "?")
    stats = gateway.client.get("/stats").json()
    assert stats["by_route"]["half"]["tokens_before"] > stats["by_route"]["half"]["tokens_after"] > 0
    assert stats["total"]["usd"] > 0
    assert stats["recent"][-1]["saved"] > 0
    metrics = gateway.client.get("/metrics").text
    assert 'tokenthrift_tokens_saved_total{route="half"}' in metrics
    assert 'tokenthrift_requests_total{outcome="compressed",route="half"}' in metrics
    assert gateway.client.get("/health").json() == {"status": "ok", "shortening": "ready"}
    page = gateway.client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page.text
    missing = gateway.client.get("/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")


def test_preview(gateway: Running) -> None:
    got = gateway.client.post("/preview", json={"text": "0123456789", "route": "half"}).json()
    assert [one["rate"] for one in got] == sorted((one["rate"] for one in got), reverse=True)
    (half,) = [one for one in got if one["rate"] == 0.5]
    assert half["pieces"] == [[True, "01234"], [False, "56789"]]
    for body, status in [
        ({"text": " ", "route": "half"}, 400),
        ({"text": 5, "route": "half"}, 400),
        ({"text": "a", "route": "none"}, 400),
        ({"text": "a" * 20_001, "route": "half"}, 413),
        ({"text": "BROKEN", "route": "half"}, 503),
        ([], 400),
    ]:
        refused = gateway.client.post("/preview", json=body)
        assert refused.status_code == status, body
        assert refused.json()["error"]["message"]
    form = gateway.client.post("/preview", content=b"{}", headers={"content-type": "text/plain"})
    assert form.status_code == 415  # so that no other site's page can ask without being asked itself


def test_slow_bodies_and_too_many_requests(gateway: Running) -> None:
    def slowly() -> Iterator[bytes]:
        yield b"{"
        time.sleep(1.5)
        yield b"}"

    got = gateway.client.post("/v1/chat/completions", content=slowly(), headers={"content-type": "application/json"})
    assert got.status_code == 408


def test_requests_beyond_the_limits_are_told_so() -> None:
    import asyncio

    async def never(_: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    with running(limits={"concurrent": 1, "seconds": 0.8}, page=False) as gateway:
        gateway.upstream.behave = never
        assert gateway.client.get("/").status_code == 404

        async def together() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=gateway.base_url, trust_env=False) as client:
                return list(await asyncio.gather(*(client.get("/v1/models") for _ in range(2))))

        late, refused = sorted(asyncio.run(together()), key=lambda got: -got.status_code)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert (late.status_code, late.json()["error"]["code"]) == (504, "too_slow")


def test_an_upstream_that_is_not_there() -> None:
    with running(reachable=False) as gateway:
        got = gateway.chat("not there " + LONG, REPLY, "?")
        assert (got.status_code, got.json()["error"]["code"]) == (502, "upstream_unreachable")
        assert got.headers["x-tokenthrift"] == "compressed"


def test_workers_that_cannot_start_shorten_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def broken(job: Any) -> Any:
        raise OSError("no model")

    with running(handle=broken) as gateway:
        assert gateway.client.get("/health").json() == {"status": "ok", "shortening": "unavailable"}
        got = gateway.chat(LONG, REPLY, "?")
        assert got.headers["x-tokenthrift-reason"] == "unavailable"
        assert "the workers cannot start: OSError no model" in caplog.text
        assert contents(gateway)[0] == LONG
