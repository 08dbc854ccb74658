"""Keeping transformers silent while a pack is converted or loaded, and one spinner on stderr where a person waits."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings inside the block, and restore its settings after it."""
    from transformers.utils import logging as untyped

    logging: Any = untyped

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def spinner(enabled: bool = True) -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done, as a spinner on stderr; it does nothing if stderr is no terminal."""
    if not (enabled and sys.stderr.isatty()):
        yield lambda _: None
        return
    from rich.console import Console

    # The stream is named, not looked up at every frame: a converter may redirect sys.stderr meanwhile.
    with Console(file=sys.stderr).status("") as line:
        yield line.update
