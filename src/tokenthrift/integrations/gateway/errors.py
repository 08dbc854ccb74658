"""What goes wrong with a request, as the JSON that clients of OpenAI's API understand."""

from __future__ import annotations

import json


class RequestError(Exception):
    """An answer that is an error; ``closing`` ends the connection after it, as its body was not read.

    The message goes to the client and to no log: it may quote what the client sent.
    """

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None, closing: bool = False):
        super().__init__(code)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.closing = closing

    @property
    def body(self) -> bytes:
        """OpenAI's form of an error."""
        kind = "invalid_request_error" if self.status < 500 else "gateway_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    @property
    def event(self) -> bytes:
        """The same as the last event of a stream, for an answer that has begun."""
        return b"data: " + self.body + b"\n\n"

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Of the answer."""
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(self.body)).encode())]
        if self.status == 503:
            headers.append((b"retry-after", b"1"))
        if self.closing:
            headers.append((b"connection", b"close"))
        return headers
