"""Who shortens the parts: this process, or workers of Ray Data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from ...core.errors import ThriftError, did_you_mean
from .inputs import Part
from .job import Done, Shortener

Engine = Callable[[Shortener, Sequence[Part]], Iterator[Done]]
RESTARTS = 3
"""How often Ray starts a worker again that died."""


def engine(name: str, workers: int | None = None) -> Engine:
    """What shortens parts, and gives what comes of each as it gets done.

    Args:
        name: ``"local"``: one after the other, here; ``"ray"``: by actors of Ray Data, on the cluster that
            ``RAY_ADDRESS`` names or on this machine. They read the inputs and write the output themselves, so both
            must be where all of them find them.
        workers: of Ray; one a CPU when None, but no more than there are parts.

    Raises:
        ThriftError: no such engine, or Ray is missing; while it runs, Ray's workers die again and again.
    """
    if name not in ("local", "ray"):
        raise ThriftError(f"unknown --engine {name}: {did_you_mean(name, ('local', 'ray'))}")
    if workers is not None and (name == "local" or workers < 1):
        raise ThriftError("--workers is the number of workers of --engine ray, at least 1")
    if name == "local":
        return map
    try:
        import ray
        import ray.data
    except ModuleNotFoundError:
        raise ThriftError("--engine ray needs Ray Data: pip install 'tokenthrift[ray]'") from None
    return partial(_on_ray, ray, workers)


def _on_ray(ray: Any, workers: int | None, shortener: Shortener, parts: Sequence[Part]) -> Iterator[Done]:
    if not parts:
        return
    if not ray.is_initialized():
        here = {} if os.environ.get("RAY_ADDRESS") else {"address": "local", "num_cpus": workers}
        ray.init(**here, logging_level="error", log_to_driver=False, include_dashboard=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    size = min(workers or int(ray.cluster_resources().get("CPU", 1)), len(parts))
    dataset = ray.data.from_items([vars(part) for part in parts], override_num_blocks=len(parts)).map_batches(
        _Worker,
        fn_constructor_args=(shortener,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=size),
        num_cpus=1,
        max_restarts=RESTARTS,
        max_task_retries=RESTARTS,
    )
    try:
        for row in dataset.iter_rows():
            if (mistake := row.pop("mistake")) is not None:
                raise ThriftError(mistake)
            yield Done(**row)
    except ray.exceptions.RayError as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ThriftError(f"Ray's workers failed ({said[0]}): the same command goes on with what is left") from None


class _Worker:
    """An actor: batches of one part."""

    def __init__(self, shortener: Shortener) -> None:
        self.shortener = shortener

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        part = Part(**{name: column.tolist()[0] for name, column in batch.items()})
        # A user's mistake is an answer: what is raised here, Ray tries again, and wraps in a page of text.
        try:
            done, mistake = self.shortener(part), None
        except ThriftError as error:
            done, mistake = Done(part.index, 0, 0, 0, 0, None), str(error)
        return {name: [value] for name, value in {**vars(done), "mistake": mistake}.items()}
