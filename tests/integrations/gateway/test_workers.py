"""Workers in processes of their own: they fail, die, hang and are ended, and the next job is done."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

import gateway_jobs
from tokenthrift.integrations.gateway.workers import WorkerError, Workers


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    made = Workers(gateway_jobs.act, 1, processes=True)
    yield made
    made.stop()


def test_a_process_of_its_own_keeps_its_state(workers: Workers) -> None:
    process = workers.ask("pid")
    assert process != os.getpid()
    with pytest.raises(WorkerError) as error:
        workers.ask("fail")
    assert str(error.value) == "ValueError"  # not what it says, which may be a prompt
    assert workers.ask("pid") == process


@pytest.mark.parametrize(("job", "said"), [("die", "died"), ("hang", "hung")])
def test_one_that_is_lost_is_replaced(workers: Workers, job: str, said: str) -> None:
    process = workers.ask("pid")
    workers._all[0]._longest = 1  # type: ignore[union-attr]
    with pytest.raises(WorkerError, match=said):
        workers.ask(job)
    workers._all[0]._longest = 60  # type: ignore[union-attr]  # a process takes its time to start
    assert workers.ask("pid") != process


def test_stopping_ends_a_job() -> None:
    made, errors = Workers(gateway_jobs.act, 1, processes=True), []

    def ask() -> None:
        try:
            made.ask("hang")
        except WorkerError as error:
            errors.append(str(error))

    made.ask("pid")
    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.2)
    made.stop()
    thread.join(10)
    assert errors == ["died"]


def test_threads() -> None:
    workers = Workers(gateway_jobs.act, 2, processes=False)
    assert workers.ask("pid") == os.getpid()
    with pytest.raises(WorkerError, match=r"^ValueError$"):
        workers.ask("fail")
