"""Shortening within a time budget: whatever goes wrong, the caller is told why in one word and goes on without."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256

from .policy import Policy, Route
from .work import Compressing, Job, Shortened
from .workers import Handle, WorkerError, Workers

log = logging.getLogger("tokenthrift.gateway")

REMEMBERED_CHARACTERS = 16_000_000
"""Of shortened texts, kept in memory so that a conversation's history is not shortened again with every turn."""
PREVIEW_SECONDS = 60.0
_WARM_UP = "This sentence is the first of two. That one is the second."


class NotShortened(Exception):
    """Why the texts stay as they are: ``starting``, ``unavailable``, ``timeout`` or ``error``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Shortener:
    """The workers, and what they have answered so far.

    Attributes:
        ready: the workers have loaded what the routes' methods need.
        failed: they could not, and why (the type of the error).
    """

    def __init__(self, policy: Policy, handle: Handle | None = None) -> None:
        self._policy = policy
        self._handle = handle or Compressing(policy.tokenizer, policy.scorer)
        self._count = policy.workers
        self._memory = _Memory(REMEMBERED_CHARACTERS)
        self.ready = False
        self.failed = ""

    def start(self) -> None:
        """Start the workers and let each load its models, in the background."""
        self._workers = Workers(self._handle, self._count, self._policy.processes)
        self._threads = ThreadPoolExecutor(self._count, "tokenthrift-worker")
        self._previews = asyncio.Lock()
        together = threading.Barrier(self._count)  # so that each worker gets one of the first jobs
        starts = [self._threads.submit(self._warm_up, together) for _ in range(self._count)]
        for future in starts:
            future.add_done_callback(lambda _: self._started(starts))

    def stop(self) -> None:
        """End the workers, whatever they are doing."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._workers.stop()

    async def shorten(self, route: Route, texts: list[str], question: str | None) -> list[Shortened]:
        """What a route's policy makes of the texts. Raises NotShortened."""
        keys = [_key(route, question, text) for text in texts]
        known = {key: self._memory.get(key) for key in keys}
        unknown = [i for i, key in enumerate(keys) if known[key] is None]
        if unknown:
            job = _job(route, tuple(texts[i] for i in unknown), question)
            made = await self._run(job, [keys[i] for i in unknown], route.time_budget)
            known.update(zip((keys[i] for i in unknown), made, strict=True))
        return [found for key in keys if (found := known[key]) is not None]

    async def preview(
        self, route: Route, text: str, question: str | None, rates: tuple[float, ...]
    ) -> list[Shortened] | None:
        """One text at several rates, in pieces; None while another preview is computed. Raises NotShortened."""
        if self._previews.locked():
            return None
        async with self._previews:
            job = _job(route, (text,) * len(rates), question, rates, pieces=True)
            return await self._run(job, [], PREVIEW_SECONDS)

    async def _run(self, job: Job, keys: list[bytes], seconds: float) -> list[Shortened]:
        if not self.ready:
            raise NotShortened("unavailable" if self.failed else "starting")
        future = self._threads.submit(self._work, job, keys)
        try:
            done, _ = await asyncio.wait({asyncio.wrap_future(future)}, timeout=seconds)
        finally:
            future.cancel()  # if it still waits for a worker; one that runs is let finish, for the memory
        if not done:
            raise NotShortened("timeout")
        result = done.pop().result()
        if result is None:
            raise NotShortened("error")
        return result

    def _work(self, job: Job, keys: list[bytes]) -> list[Shortened] | None:
        """In a thread: the job's result, remembered by its keys; None if it failed."""
        try:
            result: list[Shortened] = self._workers.ask(job)
        except WorkerError as error:
            log.warning("a worker failed: %s", error)
            return None
        for key, shortened in zip(keys, result, strict=False):
            self._memory.put(key, shortened)
        return result

    def _warm_up(self, together: threading.Barrier) -> None:
        together.wait()
        for route in (r for r in self._policy.routes if r.method):
            self._workers.ask(_job(route, (_WARM_UP,), "Which is the first?"))

    def _started(self, starts: list[Future[None]]) -> None:
        if self.ready or self.failed or not all(future.done() for future in starts):
            return
        errors = [future.exception() for future in starts if not future.cancelled()]
        if error := next(filter(None, errors), None):
            self.failed = str(error)
            message = getattr(error, "message", "")  # may be told: the only text so far is our own
            log.error("nothing will be shortened, as the workers cannot start: %s %s", error, message)
        else:
            self.ready = True


class _Memory:
    """Shortened texts by the hash of what they were made from; the least recently used go first."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._used = 0
        self._texts: OrderedDict[bytes, Shortened] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Shortened | None:
        with self._lock:
            if key in self._texts:
                self._texts.move_to_end(key)
            return self._texts.get(key)

    def put(self, key: bytes, shortened: Shortened) -> None:
        with self._lock:
            if key in self._texts:
                return
            self._texts[key] = shortened
            self._used += _size(shortened)
            while self._used > self._room:
                self._used -= _size(self._texts.popitem(last=False)[1])


def _size(shortened: Shortened) -> int:
    return len(shortened.text) + 300  # for the entry itself, however short its text


def _job(
    route: Route, texts: tuple[str, ...], question: str | None, rates: tuple[float, ...] = (), pieces: bool = False
) -> Job:
    assert route.method is not None
    return Job(
        texts=texts,
        rates=rates or (route.rate,) * len(texts),
        method=route.method,
        params=route.params,
        question=question if route.question or pieces else None,
        protect=route.protect,
        pieces=pieces,
    )


def _key(route: Route, question: str | None, text: str) -> bytes:
    made_by = repr((route.name, question if route.question else None))
    return sha256(made_by.encode("utf-8", "surrogatepass") + b"\0" + text.encode("utf-8", "surrogatepass")).digest()
