"""A fake upstream that answers with given bytes, and a gateway in front of it, both on loopback in this process."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

import gateway_jobs
from tokenthrift.integrations.gateway.policy import Policy
from tokenthrift.integrations.gateway.server import listen, make_server
from tokenthrift.integrations.gateway.shortening import Shortener

ROUTE = {"path": "/v1/*", "method": "truncate", "rate": 0.5, "min_chars": 10, "time_budget": 0.3, "name": "half"}
LONG = "The quick brown fox jumps over the lazy dog. " * 10
KEY = "sk-secret-key"


def chunk(text: str) -> bytes:
    """An event of a streamed chat completion."""
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}
    body = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def completion(text: str = "Hello.") -> bytes:
    """A chat completion that is not streamed, with white space that a re-written body would lose."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    body = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    return json.dumps(body, indent=3).encode()


def answer(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    """A whole HTTP answer."""
    lines = {"content_type": "application/json", "content_length": str(len(body)), **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nX-Up: 1\r\n\r\n"


def framed(piece: bytes) -> bytes:
    """A piece of a chunked body."""
    return f"{len(piece):x}\r\n".encode() + piece + b"\r\n"


Behaviour = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Seen:
    """A request as it came to the upstream."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Upstream:
    """Remembers requests; ``behave`` writes the answer, and an answer that it does not end is cut off."""

    seen: list[Seen] = field(default_factory=list)
    behave: Behaviour | None = None
    left: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *rest = head.decode("latin-1").split("\r\n")[:-2]
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.seen.append(Seen(first, headers, body))
                if self.behave is None:
                    writer.write(answer(completion()))
                else:
                    await self.behave(writer)
                await writer.drain()
                if writer.transport.is_closing():
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            self.left.set()
        finally:
            writer.close()


@dataclass
class Running:
    """What a test works with."""

    upstream: Upstream
    base_url: str  # without /v1
    client: httpx.Client

    def chat(self, *messages: str | dict[str, Any], **more: Any) -> httpx.Response:
        """Post a chat; strings are user messages."""
        listed = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages]
        body = {"model": "m", "messages": listed, **more}
        return self.client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {KEY}"})

    @property
    def sent(self) -> Any:
        """What came to the upstream last."""
        return self.upstream.seen[-1].json


@contextmanager
def running(
    handle: Any = gateway_jobs.halve, route: dict[str, Any] | None = None, reachable: bool = True, **policy: Any
) -> Iterator[Running]:
    """A gateway with one route, in front of a fake upstream, or of a port at which nothing listens."""
    data = {"upstream": "http://127.0.0.1:1/base/v1", "routes": [{**ROUTE, **(route or {})}], "processes": False}
    chosen = Policy.of({**data, **policy})
    upstream, loop = Upstream(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def call(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)

    fake = call(asyncio.start_server(upstream.serve, "127.0.0.1", 0))
    upstream.port = fake.sockets[0].getsockname()[1]
    if reachable:
        chosen = replace(chosen, upstream=f"http://127.0.0.1:{upstream.port}/base/v1")
    server = make_server(chosen, Shortener(chosen, handle))
    socket = listen("127.0.0.1", 0)
    base_url = f"http://127.0.0.1:{socket.getsockname()[1]}"
    serving = asyncio.run_coroutine_threadsafe(server.serve(sockets=[socket]), loop)
    try:
        with httpx.Client(base_url=base_url, timeout=20, trust_env=False) as client:
            until(lambda: server.started and client.get("/health").json()["shortening"] != "starting")
            yield Running(upstream, base_url, client)
    finally:
        server.should_exit = True
        serving.result(20)

        async def stop() -> None:
            fake.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        call(stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


def until(true: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something that happens in the background."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
