"""Workers that compute beside the event loop: processes that can be ended when they hang, or plain threads."""

from __future__ import annotations

import signal
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

Handle = Callable[[Any], Any]
"""What a worker does with a job. For processes it must be picklable, and so must jobs and results."""


class WorkerError(Exception):
    """A job failed. As text it is only the type of what was raised, since ``message`` may quote a prompt."""

    def __init__(self, kind: str, message: str = "") -> None:
        super().__init__(kind)
        self.message = message


class Workers:
    """So many workers. :meth:`ask` blocks, and is meant for as many threads as there are workers.

    Args:
        handle: what a worker does with a job.
        count: how many there are.
        processes: in processes of their own, each started with its first job; else in the thread that asks.
        longest: seconds after which a process is taken to hang, and ended.
    """

    def __init__(self, handle: Handle, count: int, processes: bool, longest: float = 120) -> None:
        self._idle: SimpleQueue[_Here | _Process] = SimpleQueue()
        self._all = [_Process(handle, longest) if processes else _Here(handle) for _ in range(count)]
        for worker in self._all:
            self._idle.put(worker)

    def ask(self, job: Any) -> Any:
        """The result of a job. Raises WorkerError."""
        worker = self._idle.get()
        try:
            return worker.ask(job)
        finally:
            self._idle.put(worker)

    def stop(self) -> None:
        """End the processes, whatever they are doing: who waits for an answer gets a WorkerError."""
        for worker in self._all:
            worker.end()


class _Here:
    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def ask(self, job: Any) -> Any:
        try:
            return self._handle(job)
        except Exception as error:
            raise WorkerError(type(error).__name__, str(error)) from None

    def end(self) -> None:
        pass  # a thread cannot be ended


class _Process:
    def __init__(self, handle: Handle, longest: float) -> None:
        self._handle = handle
        self._longest = longest
        self._process: Any = None
        self._line: Connection | None = None
        self._ended = False

    def ask(self, job: Any) -> Any:
        try:
            if self._process is None or not self._process.is_alive():
                self._start()
            assert self._line is not None
            self._line.send(job)
            if not self._line.poll(self._longest):
                raise TimeoutError
            good, reply = self._line.recv()
        except (OSError, EOFError) as error:  # TimeoutError is an OSError
            self._clear()  # the next job gets a fresh process
            raise WorkerError("hung" if isinstance(error, TimeoutError) else "died") from None
        if not good:
            raise WorkerError(*reply)
        return reply

    def end(self) -> None:
        """From another thread: the line breaks, and :meth:`ask` with it."""
        self._ended = True
        if self._process is not None:
            self._process.kill()

    def _start(self) -> None:
        self._clear()
        context = get_context("spawn")  # a fork would copy the server's sockets and torch's locked threads
        self._line, theirs = context.Pipe()
        process = context.Process(target=_run, args=(theirs, self._handle), daemon=True)
        process.start()
        theirs.close()  # so that the line breaks when the process ends
        self._process = process
        if self._ended:
            process.kill()

    def _clear(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._line is not None:
            self._line.close()
        self._process = self._line = None


def _run(line: Connection, handle: Handle) -> None:
    """The life of a process: it ends when the gateway does, which is when the line breaks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the server
    while True:
        try:
            job = line.recv()
        except (EOFError, OSError):
            return
        try:
            reply = True, handle(job)
        except Exception as error:
            reply = False, (type(error).__name__, str(error))
        line.send(reply)
