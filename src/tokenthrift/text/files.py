"""Text files that users hand in: read, or refused with one line that says why."""

from __future__ import annotations

import os
from pathlib import Path

from ..core.errors import ThriftError


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, line ends as they are.

    Raises:
        ThriftError: the file is missing, a folder, unreadable, empty, binary, or not UTF-8.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise ThriftError(f"there is no file {os.fspath(path)}") from None
    except IsADirectoryError:
        raise ThriftError(f"{os.fspath(path)} is a folder, not a text file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ThriftError(f"cannot read {os.fspath(path)}: {reason}") from None
    return decode_text(data, os.fspath(path))


def decode_text(data: bytes, name: str) -> str:
    """The text of the bytes of a file (or of standard input), called ``name`` in errors; see :func:`read_text`."""
    if b"\0" in data:
        raise ThriftError(f"{name} is binary (it has NUL bytes): give a UTF-8 text file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ThriftError(f"{name} is not UTF-8 text (byte {error.start}): convert it to UTF-8 first") from None
    if not text.strip():
        raise ThriftError(f"{name} is empty: there is nothing to read")
    return text
