"""Runs the gateway on uvicorn."""

from __future__ import annotations

import logging
import socket

import uvicorn

from ...core.errors import ThriftError
from .app import create_app
from .policy import Policy
from .shortening import Shortener

GRACE_SECONDS = 30  # for streams that still run when the gateway is told to stop


def make_server(policy: Policy, shortener: Shortener | None = None) -> uvicorn.Server:
    """A server for the policy, to run on a socket of its own: ``server.run(sockets=[...])``."""
    config = uvicorn.Config(
        create_app(policy, shortener),
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,  # the upstream's goes through
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=GRACE_SECONDS,
        ws="none",
    )
    # It writes query strings, which may hold keys; and `access_log` alone leaves it on where logging is set up later.
    logging.getLogger("uvicorn.access").disabled = True
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A socket to serve on; port 0 takes a free one. Raises ThriftError when it cannot be had."""
    try:
        kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=kind, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ThriftError(
            f"cannot listen on {host}:{port} ({getattr(error, 'strerror', None) or error}): "
            "choose another --host or --port"
        ) from None


def run(policy: Policy, on: socket.socket) -> None:
    """Serve until interrupted."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log whole addresses
    logging.getLogger("httpcore").setLevel(logging.WARNING)
    make_server(policy).run(sockets=[on])
