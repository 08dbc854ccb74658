"""What the gateway has done so far: for Prometheus, and for the page. Numbers only, no text of any request."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_STEP, _STEPS = 5, 120  # the page's curve: ten minutes, a point every five seconds


@dataclass
class Outcome:
    """What became of one request's prompt.

    Attributes:
        status: ``compressed``, ``unchanged``, or ``failed-open`` (it should have been compressed).
        reason: of the last two, in one word.
        before, after: tokens of the texts that were looked at.
        usd: saved, where the model has a price.
        seconds: that the client waited for compression.
    """

    route: str = "none"
    status: str = "unchanged"
    reason: str = ""
    before: int = 0
    after: int = 0
    usd: float | None = None
    seconds: float = 0.0

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The same as headers of the answer."""
        said: dict[str, str] = {"": self.status}
        if self.reason:
            said["-reason"] = self.reason
        if self.before:
            said |= {"-tokens-before": str(self.before), "-tokens-after": str(self.after)}
            said["-tokens-saved"] = str(self.before - self.after)
        if self.usd is not None:
            said["-saved-usd"] = f"{self.usd:.8f}"
        if self.seconds:
            said["-ms"] = f"{self.seconds * 1000:.1f}"
        return [(f"x-tokenthrift{name}".encode(), value.encode()) for name, value in said.items()]


@dataclass
class Sums:
    """Totals of a route, of a stretch of time, or of all."""

    requests: int = 0
    compressed: int = 0
    failed_open: int = 0
    tokens_before: int = 0
    tokens_after: int = 0
    usd: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count one more request."""
        self.requests += 1
        self.compressed += outcome.status == "compressed"
        self.failed_open += outcome.status == "failed-open"
        self.tokens_before += outcome.before
        self.tokens_after += outcome.after
        self.usd += outcome.usd or 0.0


class Stats:
    """Counters of one gateway; labels are names from the policy, so that clients cannot add any."""

    def __init__(self) -> None:
        self.started = time.time()
        self.total = Sums()
        self.routes: dict[str, Sums] = {}
        self._recent: deque[tuple[int, Sums]] = deque(maxlen=_STEPS)
        r = self.registry = CollectorRegistry()
        self._requests = Counter(
            "tokenthrift_requests", "Requests by route and what became of the prompt", ["route", "outcome"], registry=r
        )
        self._failures = Counter("tokenthrift_failed_open", "Prompts sent unchanged, by reason", ["reason"], registry=r)
        self._before = Counter("tokenthrift_tokens_before", "Tokens of the texts looked at", ["route"], registry=r)
        self._saved = Counter("tokenthrift_tokens_saved", "Tokens not sent", ["route"], registry=r)
        self._usd = Counter("tokenthrift_usd_saved", "US dollars by the policy's prices", ["route"], registry=r)
        self._seconds = Histogram("tokenthrift_compress_seconds", "Waited for compression", ["route"], registry=r)
        self._answers = Counter("tokenthrift_answers", "Answers by status", ["status"], registry=r)
        self._broken = Counter("tokenthrift_broken_answers", "Answers that the upstream broke off", registry=r)
        self.busy = Gauge("tokenthrift_requests_in_progress", "Requests in progress", registry=r)

    def prompt(self, outcome: Outcome) -> None:
        """A request's prompt was dealt with."""
        self._requests.labels(outcome.route, outcome.status).inc()
        if outcome.status == "failed-open":
            self._failures.labels(outcome.reason).inc()
        if outcome.before:
            self._before.labels(outcome.route).inc(outcome.before)
            self._saved.labels(outcome.route).inc(outcome.before - outcome.after)
        if outcome.usd:
            self._usd.labels(outcome.route).inc(outcome.usd)
        if outcome.seconds:
            self._seconds.labels(outcome.route).observe(outcome.seconds)
        for sums in (self.total, self.routes.setdefault(outcome.route, Sums()), self._now()):
            sums.add(outcome)

    def answer(self, status: int) -> None:
        """An answer begins."""
        self._answers.labels(str(status)).inc()

    def broken(self) -> None:
        """The upstream broke an answer off."""
        self._broken.inc()

    def prometheus(self) -> bytes:
        """For ``/metrics``."""
        return generate_latest(self.registry)

    def to_dict(self) -> dict[str, Any]:
        """For the page: totals, by route, and the last ten minutes (seconds ago, saved tokens, requests)."""
        now = self._step()
        return {
            "seconds": time.time() - self.started,
            "total": asdict(self.total),
            "by_route": {name: asdict(sums) for name, sums in self.routes.items()},
            "recent": [
                {"ago": (now - step) * _STEP, "saved": s.tokens_before - s.tokens_after, "requests": s.requests}
                for step, s in self._recent
                if now - step < _STEPS
            ],
        }

    def _step(self) -> int:
        return int(time.time() // _STEP)

    def _now(self) -> Sums:
        if not self._recent or self._recent[-1][0] != self._step():
            self._recent.append((self._step(), Sums()))
        return self._recent[-1][1]
