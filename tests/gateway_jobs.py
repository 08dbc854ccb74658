"""What workers run in the gateway's tests: importable in a process of its own, and without torch."""

from __future__ import annotations

import os
import time
from typing import Any

from tokenthrift.integrations.gateway.work import Job, Shortened


def halve(job: Job) -> list[Shortened]:
    """The first half of each text; a token is a character. Some words make it misbehave."""
    out = []
    for text, rate in zip(job.texts, job.rates, strict=True):
        if "SLOW" in text:
            time.sleep(0.6)
        if "BROKEN" in text:
            raise ValueError(f"a message that quotes {text}")
        if "GROWS" in text:
            out.append(Shortened(text + text, len(text), 2 * len(text)))
            continue
        n = round(len(text) * rate)
        pieces = ((True, text[:n]), (False, text[n:])) if job.pieces else ()
        out.append(Shortened(text[:n], len(text), n, pieces))
    return out


def act(job: Any) -> Any:
    """For the workers themselves."""
    if job == "die":
        os._exit(1)
    if job == "hang":
        time.sleep(60)
    if job == "fail":
        raise ValueError("a message that quotes a prompt")
    return os.getpid() if job == "pid" else job
