"""The progress bar of long work, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(show: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Gives ``tick(text, done, total)``; a new bar begins where ``done`` is 0."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    times = (Elapsed(), Remaining())
    with Progress(*columns, *times, console=Console(stderr=True), disable=not show) as bar:

        def tick(text: str, done: int, total: int) -> None:
            if done == 0 or not bar.task_ids:
                bar.add_task(text, total=total)
            bar.update(bar.task_ids[-1], description=text[:56], completed=done)

        yield tick
