"""The one server behind the gateway: requests to it, and its answers, as they are.

It is reached through httpx's transport alone, which knows nothing of redirects, cookies, proxies from the environment
or passwords from files: nothing but the configured address is ever connected to, and no header is added to a request.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable
from urllib.parse import unquote_to_bytes

import httpx

from .errors import RequestError
from .policy import Limits

Headers = list[tuple[bytes, bytes]]

PREFIX = "/v1"
"""Where the gateway has what the upstream has at its address."""
HELD_BYTES = 4_000_000
"""An answer in JSON up to this length is passed on when it is complete: if it breaks off, the client gets an error."""

# Of one connection, not of the request or the answer (RFC 9110, 7.6.1), and what httpx writes itself.
_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"host", b"content-length", b"expect",
}  # fmt: skip
_DIGESTS = {b"content-md5", b"digest", b"content-digest", b"repr-digest", b"content-encoding"}
_PATH = re.compile(rb"/v1(?:/[\w.~!$&'()*+,;=:@%-]*)*", re.ASCII)
_EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")


class Upstream:
    """Sends requests to one address. Use as ``async with``."""

    def __init__(self, address: str, limits: Limits) -> None:
        self._base = httpx.URL(address)
        self._timeout = {
            "connect": limits.connect_seconds,
            "pool": limits.connect_seconds,
            "read": limits.idle_seconds,
            "write": limits.idle_seconds,
        }
        # The number of connections is bounded by that of requests. An idle one is dropped before servers drop theirs.
        pool = httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=4)
        self._transport = httpx.AsyncHTTPTransport(verify=httpx.create_ssl_context(), trust_env=False, limits=pool)

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.aclose()

    def address(self, path: bytes, query: bytes) -> httpx.URL:
        """Where a request to the gateway goes: below the configured address, or nowhere.

        Raises:
            RequestError: a path that could lead anywhere else.
        """
        steps = path.split(b"/")
        if not _PATH.fullmatch(path) or any(_leaves(unquote_to_bytes(step)) for step in steps):
            raise RequestError(400, "bad_path", "the path has characters or segments that the gateway does not pass on")
        target = self._base.raw_path.rstrip(b"/") + path.removeprefix(PREFIX.encode())
        try:
            return self._base.copy_with(raw_path=(target or b"/") + (b"?" + query if query else b""))
        except (httpx.InvalidURL, UnicodeDecodeError):
            raise RequestError(400, "bad_path", "the query has characters that the gateway does not pass on") from None

    async def open(self, method: str, address: httpx.URL, headers: Headers, body: bytes) -> httpx.Response:
        """Send a request; the answer's body is yet to be read, and must be closed.

        Raises:
            RequestError: 502 or 504, when there is no answer, or one that sends the client elsewhere.
        """
        request = httpx.Request(method, address, headers=headers, extensions={"timeout": self._timeout})
        if body or method in ("POST", "PUT", "PATCH"):
            request.headers["content-length"] = str(len(body))
        request.stream = httpx.ByteStream(body)
        try:
            response = await self._transport.handle_async_request(request)
        except httpx.TimeoutException:
            raise RequestError(504, "upstream_timeout", "the upstream did not answer in time") from None
        except (httpx.TransportError, httpx.InvalidURL, OSError):
            raise RequestError(502, "upstream_unreachable", "the upstream cannot be reached, or broke off") from None
        if response.status_code in (301, 302, 303, 307, 308):
            await response.aclose()
            raise RequestError(
                502,
                "upstream_redirect",
                "the upstream answered with a redirect, which the gateway does not follow: "
                "its policy must name the final address",
            )
        return response


def forwarded(headers: Iterable[tuple[bytes, bytes]], *, changed: bool = False) -> Headers:
    """What of a request's headers goes to the upstream, credentials included; ``changed`` if its body is another."""
    kept = _end_to_end(headers)
    if changed:
        kept = [(name, value) for name, value in kept if name not in _DIGESTS]
    if all(name != b"accept-encoding" for name, _ in kept):
        kept.append((b"accept-encoding", b"identity"))  # none given: servers may take that for any
    return kept


def returned(response: httpx.Response) -> Headers:
    """What of the answer's headers goes to the client; its length too, as its bytes are not touched."""
    kept = _end_to_end(response.headers.raw)
    if (length := response.headers.get("content-length")) is not None:
        kept.append((b"content-length", length.encode()))
    return kept


def is_stream(response: httpx.Response) -> bool:
    """Whether the answer is a stream of events that one more can be added to."""
    return _media_type(response) == "text/event-stream" and "content-encoding" not in response.headers


def is_short_json(response: httpx.Response) -> bool:
    """Whether the answer is JSON, and not known to be too long to be held."""
    length = response.headers.get("content-length", "0")
    return _media_type(response) == "application/json" and length.isdigit() and int(length) <= HELD_BYTES


async def whole_events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes, cut only between events: so that after a break the client does not have half of one."""
    held = b""
    async for chunk in chunks:
        held += chunk
        end = max(held.rfind(mark) + len(mark) if mark in held else 0 for mark in _EVENT_ENDS)
        if len(held) > HELD_BYTES:
            end = len(held)
        if end:
            yield held[:end]
            held = held[end:]
    if held:
        yield held


def _end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    lower = [(name.lower(), value) for name, value in headers]
    named = {token.strip().lower() for name, value in lower if name == b"connection" for token in value.split(b",")}
    return [(n, v) for n, v in lower if n not in _HOP and n not in named and not n.startswith(b"x-tokenthrift")]


def _leaves(step: bytes) -> bool:
    """Whether a segment of a path, once decoded, could be read as a way up."""
    parts = re.split(rb"[/\\]", step)  # a model's id may have a slash, written %2F
    return b"." in parts or b".." in parts or any(mark in step for mark in (b"%", b"\0", b"\r", b"\n"))


def _media_type(response: httpx.Response) -> str:
    kind: str = response.headers.get("content-type", "")
    return kind.partition(";")[0].strip().lower()
