"""The gateway under load: added latency, many streams at a time, an upstream that dies in the middle of a stream.

    python benchmarks/gateway.py [--upstream URL --model NAME] [--requests 300] [--streams 200] [--seconds 60]

Starts a fake upstream in a process of its own, and `tokenthrift serve` in front of it; with --upstream a real
OpenAI-compatible server takes the fake one's place for everything but the kill, which is always done to the fake one.
Prints a markdown table. Latencies are of a chat that is not streamed, asked directly and through the gateway in turns
over open connections, by the official client; nothing is shortened unless --method says so.

Needs the extra `serve` and the package `openai`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

import httpx
import openai

CHAT = [
    {"role": "user", "content": "The quick brown fox jumps over the lazy dog. " * 100},
    {"role": "assistant", "content": "Noted."},
    {"role": "user", "content": "What does the fox do?"},
]
Rows = list[tuple[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", help="base URL of a real server, e.g. http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="fake", help="model to ask the upstream for")
    parser.add_argument("--key", default=os.environ.get("OPENAI_API_KEY", "none"), help="the upstream's key")
    parser.add_argument("--method", help="text method; none leaves prompts alone")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60, help="how long each stream of the fake upstream lasts")
    parser.add_argument("--fake", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fake is not None:
        asyncio.run(fake_upstream(args.fake))
        return
    rows: Rows = []
    with Processes() as processes:
        fake_port, port = free_port(), free_port()
        fake, fake_url = processes.start(fake_command(fake_port)), f"http://127.0.0.1:{fake_port}/v1"
        upstream = args.upstream or fake_url
        processes.start(gateway_command(upstream, port, args.method))
        gateway = f"http://127.0.0.1:{port}/v1"
        wait_for(fake_url + "/models")
        wait_for(f"http://127.0.0.1:{port}/health", ready=bool(args.method))
        rows += asyncio.run(latency(upstream, gateway, args))
        rows += asyncio.run(streams(gateway, args))
        if args.upstream:
            port = free_port()
            processes.start(gateway_command(fake_url, port, args.method))
            gateway = f"http://127.0.0.1:{port}/v1"
            wait_for(f"http://127.0.0.1:{port}/health")
        rows += asyncio.run(kill(gateway, fake, args))
        wait_until_down(fake_port)
        processes.start(fake_command(fake_port))
        wait_for(fake_url + "/models")
        rows += asyncio.run(alive(gateway, args))
    print("| what | measured |\n|---|---|")
    print("\n".join(f"| {what} | {value} |" for what, value in rows))


# ---- what is measured -------------------------------------------------------------------------------------------


async def latency(upstream: str, gateway: str, args: Any) -> Rows:
    """Of one chat at a time, direct and through the gateway in turns."""
    direct: list[float] = []
    through: list[float] = []
    async with client(upstream, args) as one, client(gateway, args) as other:
        for i in range(args.requests + 10):
            for asking, times in ((one, direct), (other, through)):
                start = time.perf_counter()
                await asking.chat.completions.create(model=args.model, messages=CHAT, max_tokens=1)
                if i >= 10:  # the first ones open connections
                    times.append((time.perf_counter() - start) * 1000)
    added = statistics.median(through) - statistics.median(direct)
    return [
        (f"p50 of {args.requests} chats, direct", f"{statistics.median(direct):.2f} ms"),
        ("p50 through the gateway", f"{statistics.median(through):.2f} ms"),
        ("added p50", f"{added:.2f} ms"),
        ("p99 direct, through the gateway", f"{_p99(direct):.1f} ms, {_p99(through):.1f} ms"),
    ]


async def streams(gateway: str, args: Any) -> Rows:
    """Many streams at a time, each read to its end."""
    gaps: list[float] = []

    async def one(asking: openai.AsyncOpenAI) -> int:
        events, last = 0, time.perf_counter()
        async for _ in await asking.chat.completions.create(
            model=args.model,
            messages=CHAT,
            stream=True,
            extra_body={"seconds": args.seconds} if not args.upstream else {},
        ):
            events += 1
            gaps.append(time.perf_counter() - last)
            last = time.perf_counter()
        return events

    start = time.perf_counter()
    async with client(gateway, args) as asking:
        results = await asyncio.gather(*(one(asking) for _ in range(args.streams)), return_exceptions=True)
    errors = [r for r in results if isinstance(r, BaseException)]
    events = sum(r for r in results if isinstance(r, int))
    return [
        (f"{args.streams} streams at a time", f"{time.perf_counter() - start:.1f} s, {events:,} events"),
        ("errors", str(len(errors)) + (f" ({type(errors[0]).__name__})" if errors else "")),
        ("longest time between two events of a stream", f"{max(gaps, default=0) * 1000:.0f} ms"),
    ]


async def kill(gateway: str, fake: subprocess.Popen[bytes], args: Any) -> Rows:
    """The fake upstream is killed while streams run."""
    ends: list[str] = []

    async def one(asking: openai.AsyncOpenAI) -> None:
        try:
            more = {"seconds": 30}
            async for _ in await asking.chat.completions.create(
                model="fake", messages=CHAT, stream=True, extra_body=more
            ):
                pass
            ends.append("no error")
        except openai.APIError as error:
            ends.append(f"{type(error).__name__}: {error.message}")

    async with client(gateway, args) as asking:
        tasks = [asyncio.create_task(one(asking)) for _ in range(10)]
        await asyncio.sleep(2)
        fake.send_signal(signal.SIGKILL)
        start = time.perf_counter()
        await asyncio.gather(*tasks)
    told = "; ".join(f"{ends.count(end)} × {end}" for end in sorted(set(ends)))
    return [("upstream killed under 10 streams: clients saw", f"{told}, within {time.perf_counter() - start:.2f} s")]


async def alive(gateway: str, args: Any) -> Rows:
    """The upstream is back: the same gateway goes on."""
    async with client(gateway, args) as asking:
        got = await asking.chat.completions.create(model="fake", messages=CHAT)
    return [("the next chat, with the upstream back", f"answered: {got.choices[0].message.content}")]


def client(url: str, args: Any) -> openai.AsyncOpenAI:
    """The official client, without retries, which would hide errors."""
    return openai.AsyncOpenAI(base_url=url, api_key=args.key, max_retries=0, timeout=600)


def _p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


# ---- processes --------------------------------------------------------------------------------------------------


class Processes:
    """Processes that end with the ``with`` block."""

    def __enter__(self) -> Processes:
        self._all: list[subprocess.Popen[bytes]] = []
        return self

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        """Start one; its log goes nowhere, its errors do not."""
        self._all.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        return self._all[-1]

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            process.terminate()
        for process in self._all:
            process.wait(30)


def fake_command(port: int) -> list[str]:
    return [sys.executable, __file__, "--fake", str(port)]


def gateway_command(upstream: str, port: int, method: str | None) -> list[str]:
    run = "import logging; logging.disable(logging.INFO); from tokenthrift.cli.main import run; run()"
    command = [sys.executable, "-c", run, "serve", "--upstream", upstream, "--port", str(port)]
    return [*command, *(["--method", method] if method else [])]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def wait_for(url: str, ready: bool = False) -> None:
    """Until a server answers, and with ``ready`` until its workers are."""
    for _ in range(1200):
        try:
            got = httpx.get(url, trust_env=False)
            if not ready or got.json()["shortening"] == "ready":
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"nothing answers at {url}")


def wait_until_down(port: int) -> None:
    while not socket.socket().connect_ex(("127.0.0.1", port)):
        time.sleep(0.05)


# ---- the fake upstream ------------------------------------------------------------------------------------------


async def fake_upstream(port: int) -> None:
    """Answers chats at once; streams an event a tenth of a second for as long as the request says."""
    server = await asyncio.start_server(_serve, "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            lengths = [
                line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
            ]
            body = json.loads(await reader.readexactly(int(lengths[0]))) if lengths else {}
            if body.get("stream"):
                await _stream(writer, float(body.get("seconds", 1)))
            else:
                message = {"role": "assistant", "content": "It jumps."}
                answer = _json(object="chat.completion", choices=[{"index": 0, "message": message}])
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(answer)
                writer.write(head + answer)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def _stream(writer: asyncio.StreamWriter, seconds: float) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    delta = {"index": 0, "delta": {"role": "assistant", "content": "fox "}}
    event = b"data: " + _json(object="chat.completion.chunk", choices=[delta]) + b"\n\n"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        writer.write(b"%x\r\n%b\r\n" % (len(event), event))
        await writer.drain()
        await asyncio.sleep(0.1)
    writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


def _json(**more: Any) -> bytes:
    return json.dumps({"id": "c", "created": 1, "model": "fake", **more}).encode()


if __name__ == "__main__":
    main()
