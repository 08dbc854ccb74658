"""Methods of one object, replaced for a while."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any


def replace_method(owner: Any, name: str, wrapper: Callable[..., Any], undo: ExitStack) -> Callable[..., Any]:
    """Put ``wrapper``, which is given the plain function first, in the place of a method of one object."""
    plain, own = getattr(owner, name), name in vars(owner)

    @wraps(plain)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return wrapper(plain, *args, **kwargs)

    replaced.plain = plain  # type: ignore[attr-defined]
    undo.callback(partial(setattr, owner, name, plain) if own else partial(vars(owner).pop, name, None))
    setattr(owner, name, replaced)
    return replaced


def note_calls(module: Any, note: Callable[[tuple[Any, ...], dict[str, Any]], None], undo: ExitStack) -> None:
    """Show ``note`` the arguments of each forward of a module, before it runs, until ``undo`` closes.

    Not by a hook: for what runs once a layer and token, its machinery takes longer than what is noted.
    """

    def noting(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        note(args, kwargs)
        return plain(*args, **kwargs)

    replace_method(module, "forward", noting, undo)


def plain_forward(model: Any) -> Callable[..., Any]:
    """What a model's ``forward`` was before a session replaced it: for texts that are read beside the session."""
    forward: Callable[..., Any] = getattr(model.forward, "plain", model.forward)
    return forward
