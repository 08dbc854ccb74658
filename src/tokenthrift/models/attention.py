"""A place in front of every attention call of a model, without touching its code.

While a session needs it, the model's config names our attention function, which hands each call to the watcher of the
calling module and then to the function that the model used before (so an idle watcher changes no bit).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..core.errors import ThriftError

PREFIX = "tokenthrift_"
BASES = ("sdpa", "eager")
"""Implementations that take the additive or boolean 4-D masks that reduced caches need."""


class Watcher(Protocol):
    """Sees each attention call of one module, before and after it."""

    def before(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
        """May replace the mask. ``query`` ``(batch, heads, q, dim)``, ``key`` ``(batch, kv_heads, kv, dim)``."""

    def after(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Runs when the output exists; may reduce the layer's cache."""


_watchers: WeakKeyDictionary[nn.Module, Watcher] = WeakKeyDictionary()


def watch_attention(modules: Iterable[nn.Module], make: Callable[[nn.Module], Watcher], undo: ExitStack) -> None:
    """Put a watcher on every module's attention calls until ``undo`` closes.

    Raises:
        ThriftError: the attention implementation has no place for masks of our own, or another session is there.
    """
    modules = list(modules)
    for module in modules:
        if module in _watchers:
            raise ThriftError("another session is installed on this model; leave its with block first")
    configs: dict[int, Any] = {id(m.config): m.config for m in modules}
    for config in configs.values():
        base = config._attn_implementation
        if base not in BASES:
            raise ThriftError(
                f"attention implementation '{base}' is not supported; load the model with attn_implementation='sdpa'"
            )
        _register(base)
        undo.callback(setattr, config, "_attn_implementation_internal", base)
        config._attn_implementation_internal = PREFIX + base
    for module in modules:
        undo.callback(_watchers.pop, module, None)
        _watchers[module] = make(module)


def _register(base: str) -> None:
    """Make our name known to transformers, with the mask function of the implementation behind it."""
    name = PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
        AttentionInterface.register(name, _attention_over(base))


def _attention_over(base: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        # Eager attention is a function of each model's own file, not of the shared table.
        default: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        run = ALL_ATTENTION_FUNCTIONS.get_interface(base, default)
        watcher = _watchers.get(module)
        if watcher is None:
            return run(module, query, key, value, attention_mask, **kwargs)
        mask = watcher.before(query, key, attention_mask)
        out = run(module, query, key, value, mask, **kwargs)
        watcher.after(query, key, value, mask, kwargs.get("scaling") or query.shape[-1] ** -0.5)
        return out

    return attention
