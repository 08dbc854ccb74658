"""The gateway as an ASGI application: what happens to a request, from top to bottom.

A request's body is read within limits; its prompt is shortened as the policy's route says, or goes on as it is when
anything is in the way; the upstream's answer is passed on byte for byte. No text and no header of a request is logged.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

import httpx
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route as Path
from starlette.types import Receive, Scope, Send

from . import contents
from .errors import RequestError
from .policy import Limits, Policy, Route
from .shortening import NotShortened, Shortener
from .stats import Outcome, Stats
from .upstream import HELD_BYTES, Upstream, forwarded, is_short_json, is_stream, returned, whole_events

log = logging.getLogger("tokenthrift.gateway")

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
PREVIEW_RATES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
PREVIEW_CHARACTERS = 20_000
_UNREAD_BYTES = 64_000_000  # of a body that is too long: read and dropped, so that the client comes to hear the answer
_ONLY_OURS = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


def create_app(policy: Policy, shortener: Shortener | None = None) -> Starlette:
    """The application for any ASGI server. ``shortener`` stands in for the policy's, in tests."""
    gateway = Gateway(policy, shortener or Shortener(policy))
    own = [Path("/health", gateway.health), Path("/metrics", gateway.metrics)]
    if policy.page:
        own += [
            Path("/", gateway.page),
            Path("/stats", gateway.statistics),
            Path("/preview", gateway.preview, methods=["POST"]),
        ]
    relayed = [Path("/v1", gateway.relay), Path("/v1/{rest:path}", gateway.relay)]
    app = Starlette(
        routes=[*own, *relayed],
        lifespan=gateway.lifespan,
        exception_handlers={HTTPException: _http_error, RequestError: _request_error},
    )
    app.router.redirect_slashes = False
    return app


class Gateway:
    """The handlers, and what they share."""

    def __init__(self, policy: Policy, shortener: Shortener) -> None:
        self.policy = policy
        self.shortener = shortener
        self.stats = Stats()
        self.relay = _Relay(self)
        self.busy = 0

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Start and stop what runs beside the requests."""
        self.upstream = Upstream(self.policy.upstream, self.policy.limits)
        self.shortener.start()
        try:
            yield
        finally:
            self.shortener.stop()
            await self.upstream.close()

    # ---- the gateway's own pages ------------------------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        """That the gateway answers, and whether it shortens."""
        shortening = "ready" if self.shortener.ready else "unavailable" if self.shortener.failed else "starting"
        return JSONResponse({"status": "ok", "shortening": shortening})

    async def metrics(self, _: Request) -> Response:
        """For Prometheus."""
        return Response(self.stats.prometheus(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def page(self, _: Request) -> Response:
        """The page for people."""
        text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"content-security-policy": _ONLY_OURS})

    async def statistics(self, _: Request) -> Response:
        """What the page shows: numbers since the start, and the routes of the policy."""
        routes = [
            {"name": r.name, "path": r.path, "model": r.model, "method": r.method, "rate": r.rate}
            for r in self.policy.routes
        ]
        return JSONResponse({**self.stats.to_dict(), "routes": routes, "in_progress": self.busy})

    async def preview(self, request: Request) -> Response:
        """One text at several rates, as pieces that were kept or dropped."""
        _check_json(request.headers)
        body = _parse(await _body(request.headers, request.receive, self.policy.limits))
        text, asked = body.get("text"), body.get("question") or None
        if not isinstance(text, str) or not text.strip() or not isinstance(asked, str | None):
            raise RequestError(400, "bad_text", "write the text to shorten into the box", param="text")
        if len(text) > PREVIEW_CHARACTERS:
            raise RequestError(
                413, "too_long", f"the text has {len(text):,} characters: this page takes {PREVIEW_CHARACTERS:,}"
            )
        route = next((r for r in self.policy.routes if r.method and r.name == body.get("route")), None)
        if route is None:
            raise RequestError(400, "no_route", "the policy has no such route that shortens", param="route")
        try:
            made = await self.shortener.preview(route, text, asked, PREVIEW_RATES)
        except NotShortened as error:
            raise RequestError(503, "not_shortened", f"the text cannot be shortened now: {error.reason}") from None
        if made is None:
            raise RequestError(503, "busy", "another text is being shortened: try again in a moment")
        shown = [
            {"rate": rate, "tokens_before": one.before, "tokens_after": one.after, "pieces": one.pieces}
            for rate, one in zip(PREVIEW_RATES, made, strict=True)
        ]
        return JSONResponse(shown)

    # ---- what happens to a prompt -----------------------------------------------------------------------------------

    async def shorten(self, path: str, headers: Headers, body: bytes) -> tuple[bytes, Outcome]:
        """The body to send instead, or the same one, and what became of it.

        Raises:
            RequestError: the body is not what the path takes.
        """
        field = contents.FIELDS.get(path)
        if field is None:
            return body, Outcome(reason="no-prompt")
        _check_json(headers)
        if headers.get("content-encoding", "identity") != "identity":
            return body, Outcome(reason="encoded")
        request = _parse(body)
        if (count := contents.entries(request, field)) > (most := self.policy.limits.messages):
            raise RequestError(
                400, "too_many_messages", f"'{field}' has {count:,} entries: the gateway takes {most:,}", param=field
            )
        model = request.get("model")
        model = model if isinstance(model, str) else ""
        route = self.policy.route(path, model)
        if route is None or route.method is None:
            return body, Outcome(route.name if route else "none", reason="policy")
        if headers.get("x-tokenthrift", "").lower() == "off":
            return body, Outcome(route.name, reason="asked")
        start = time.perf_counter()
        outcome = Outcome(route.name)
        try:
            await self._shorten(request, field, route, outcome)
            if outcome.status == "compressed":
                outcome.seconds = time.perf_counter() - start
                body = json.dumps(request, allow_nan=False, separators=(",", ":")).encode()
                if (price := self.policy.price(model)) is not None:
                    outcome.usd = (outcome.before - outcome.after) * price
        except NotShortened as error:
            outcome = Outcome(route.name, "failed-open", error.reason, seconds=time.perf_counter() - start)
        except Exception as error:  # whatever it is, the request must go out
            _log_unexpected("shortening failed", error)
            outcome = Outcome(route.name, "failed-open", "error", seconds=time.perf_counter() - start)
        return body, outcome

    async def _shorten(self, request: dict[str, Any], field: str, route: Route, outcome: Outcome) -> None:
        """Shorten the request's texts in place."""
        slots = contents.slots(request, field, route)
        if not slots:
            outcome.reason = "nothing-to-shorten"
            return
        asked = contents.question(request, field) if route.question else None
        made = await self.shortener.shorten(route, [slot.text for slot in slots], asked)
        for slot, shortened in zip(slots, made, strict=True):
            smaller = shortened.after < shortened.before
            outcome.before += shortened.before
            outcome.after += shortened.after if smaller else shortened.before
            if smaller:
                slot.put(shortened.text)
        outcome.status = "compressed" if outcome.after < outcome.before else "unchanged"
        outcome.reason = "" if outcome.status == "compressed" else "not-smaller"


class _Relay:
    """The ASGI application behind ``/v1``: one request to the upstream for one to the gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._limits = gateway.policy.limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway, answer = self._gateway, _Answer(send)
        start = time.perf_counter()
        gateway.busy += 1
        gateway.stats.busy.set(gateway.busy)
        try:
            await self._handle(scope, receive, answer)
        except RequestError as error:
            await answer.fail(error)
        except Exception as error:
            _log_unexpected("a request failed", error)
            await answer.fail(RequestError(500, "internal_error", "the gateway failed: its log says where"))
        finally:
            gateway.busy -= 1
            gateway.stats.busy.set(gateway.busy)
            gateway.stats.answer(answer.status)
            o, ms = answer.outcome, (time.perf_counter() - start) * 1000
            shortened = f"{o.route}: {o.status} {o.reason or f'{o.before} -> {o.after} tokens'}"
            path = ascii(scope["raw_path"][:200].decode("latin-1"))  # a client's bytes: no line break gets into the log
            log.info("%s %s %d in %.0f ms, %s", scope["method"], path, answer.status, ms, shortened)

    async def _handle(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        if scope["method"] not in METHODS:
            raise RequestError(405, "bad_method", "the gateway does not pass this method on")
        if self._gateway.busy > self._limits.concurrent:
            raise RequestError(
                503, "overloaded", "the gateway has as many requests as it takes: try again", closing=True
            )
        body = await _body(Headers(scope=scope), receive, self._limits)
        # The client is listened to from here on, so that work for one that has gone ends.
        work = asyncio.create_task(self._pass_on(scope, body, answer))
        gone = asyncio.create_task(_gone(receive))
        try:
            ended, _ = await asyncio.wait(
                {work, gone}, timeout=self._limits.seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if answer.complete:  # the server says gone after a complete answer too
                await work
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.wait({work, gone})
        if work.done() and not work.cancelled():
            work.result()
        elif not ended:
            raise RequestError(504, "too_slow", f"the answer took longer than {self._limits.seconds:g} seconds")

    async def _pass_on(self, scope: Scope, body: bytes, answer: _Answer) -> None:
        gateway = self._gateway
        address = gateway.upstream.address(scope["raw_path"], scope["query_string"])
        sent = body
        if scope["method"] == "POST":
            sent, answer.outcome = await gateway.shorten(scope["path"].rstrip("/"), Headers(scope=scope), body)
            gateway.stats.prompt(answer.outcome)
        headers = forwarded(scope["headers"], changed=sent is not body)
        response = await gateway.upstream.open(scope["method"], address, headers, sent)
        try:
            await self._return(response, answer)
        finally:
            await response.aclose()

    async def _return(self, response: httpx.Response, answer: _Answer) -> None:
        """Pass the answer on, piece by piece as it comes."""
        streaming, held = is_stream(response), b""
        answer.takes_event = streaming
        waiting = is_short_json(response)
        try:
            chunks = response.aiter_raw()
            async for piece in whole_events(chunks) if streaming else chunks:
                held += piece
                if not waiting or len(held) > HELD_BYTES:
                    await answer.start(response)
                    await answer.write(held)
                    waiting, held = False, b""
        except httpx.TimeoutException:
            self._gateway.stats.broken()
            raise RequestError(504, "upstream_timeout", "the upstream stopped in the middle of its answer") from None
        except (httpx.HTTPError, httpx.StreamError):
            self._gateway.stats.broken()
            raise RequestError(
                502, "upstream_broke_off", "the upstream broke off in the middle of its answer"
            ) from None
        await answer.start(response)
        await answer.write(held, last=True)


class _Answer:
    """What goes back to the client, and how far it has come."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.outcome = Outcome(reason="no-prompt")
        self.status = 499  # the client left before there was an answer
        self.started = self.complete = self.takes_event = False

    async def start(self, response: httpx.Response) -> None:
        """Pass status and headers on, once."""
        if not self.started:
            await self._start(response.status_code, returned(response) + self.outcome.headers)

    async def write(self, piece: bytes, last: bool = False) -> None:
        """Pass a piece of the body on."""
        self.complete = last
        await self._send({"type": "http.response.body", "body": piece, "more_body": not last})

    async def fail(self, error: RequestError) -> None:
        """The error as the answer; or as a last event; or, where neither is possible, a broken connection."""
        if not self.started:
            await self._start(error.status, error.headers + self.outcome.headers)
            await self.write(error.body, last=True)
        elif self.takes_event and not self.complete:
            await self.write(error.event, last=True)

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.started, self.status = True, status
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


# ---- bodies -----------------------------------------------------------------------------------------------------


async def _body(headers: Headers, receive: Receive, limits: Limits) -> bytes:
    """The request's body, within the limits of size and time."""
    most = int(limits.body_mb * 1e6)
    too_long = f"the body is longer than the {limits.body_mb:g} MB that the gateway takes"
    declared = headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > most and (headers.get("expect") or int(declared) > most + _UNREAD_BYTES):
        raise RequestError(413, "body_too_long", too_long, closing=True)
    pieces: list[bytes] = []
    length = 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RequestError(400, "incomplete_body", "the connection ended before the body did")
                more = message.get("more_body", False)
                length += len(message.get("body", b""))
                if length > most + _UNREAD_BYTES:
                    raise RequestError(413, "body_too_long", too_long, closing=True)
                if length > most:
                    pieces.clear()
                else:
                    pieces.append(message.get("body", b""))
    except TimeoutError:
        raise RequestError(408, "body_too_slow", "the body did not come in time", closing=True) from None
    if length > most:
        raise RequestError(413, "body_too_long", too_long)
    return b"".join(pieces)


async def _gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_json(headers: Headers) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(415, "bad_content_type", f"this path takes application/json, not {kind[:100] or 'nothing'}")


def _parse(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):  # bad UTF-8 and numbers without end are ValueErrors too
        raise RequestError(400, "bad_json", "the body is no JSON") from None
    if not isinstance(data, dict):
        raise RequestError(400, "bad_json", f"the body is a JSON {type(data).__name__}, not an object")
    return data


def _no_constant(name: str) -> None:
    raise ValueError(name)


# ---- errors -----------------------------------------------------------------------------------------------------


async def _request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    response = Response(error.body, error.status)
    response.raw_headers = error.headers
    return response


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: an unknown path or method."""
    assert isinstance(error, HTTPException)
    said = f"the gateway has nothing at this path for {request.method}: the API is below /v1"
    return await _request_error(request, RequestError(error.status_code, "not_found", said))


def _log_unexpected(what: str, error: Exception) -> None:
    """Where it happened, without its message, which may quote a prompt or a key."""
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s: %s\n%s", what, type(error).__name__, where)
