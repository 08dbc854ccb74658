"""A place in front of every attention call of a model, without touching its code.

While a session needs it, the model's config names our attention function, which hands each call to the watcher of the
calling module and then to the function that the model used before (so an idle watcher changes no bit).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..core.errors import ThriftError

PREFIX = "tokenthrift_"
BASES = ("sdpa", "eager")
"""Implementations that take the additive or boolean 4-D masks that reduced caches need."""
EXOTIC = ("softcap", "s_aux", "position_bias")
"""Arguments of attention functions that make them more than softmax attention with a mask."""


class Watcher:
    """Sees each attention call of one module, before and after it."""

    def before(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
        """May replace the mask. ``query`` ``(batch, heads, q, dim)``, ``key`` ``(batch, kv_heads, kv, dim)``."""
        return mask

    def answer(self, query: Tensor, scaling: float) -> Tensor | None:
        """May give what attention gives, ``(batch, heads, q, dim)``, in the model's stead."""
        return None

    def after(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Runs when the output exists; may reduce the layer's cache."""


class Attend(Protocol):
    """Takes the place of one module's attention calls."""

    def __call__(
        self, run: Run, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """What attention gives, ``(batch, heads, q, dim)``; ``run`` is what the model would have called."""


class Run(Protocol):
    """The model's own attention function.

    Attributes:
        exotic: what it does besides softmax attention with a mask (sinks, capped logits), in words; else empty.
    """

    exotic: str

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """``(batch, heads, q, dim)``; ``key`` and ``value`` ``(batch, kv_heads, kv, dim)``."""


_watchers: WeakKeyDictionary[nn.Module, Watcher] = WeakKeyDictionary()
_replaced: WeakKeyDictionary[nn.Module, Attend] = WeakKeyDictionary()
_exotic: WeakSet[nn.Module] = WeakSet()


def is_replaced(module: nn.Module) -> bool:
    """Whether a session answers this module's attention calls."""
    return module in _replaced


def is_exotic(module: nn.Module) -> bool:
    """Whether a module that was called before does more than softmax attention with a mask."""
    return module in _exotic


def watch_attention(modules: Iterable[nn.Module], make: Callable[[nn.Module], Watcher], undo: ExitStack) -> None:
    """Put a watcher on every module's attention calls until ``undo`` closes.

    Raises:
        ThriftError: the attention implementation has no place for masks of our own, or another session is there.
    """
    _stand_before(list(modules), _watchers, make, undo, BASES)


@contextmanager
def watching_instead(modules: Iterable[nn.Module], make: Callable[[nn.Module], Watcher]) -> Iterator[None]:
    """While this is entered, these watchers stand before the modules' attention calls, and no others."""
    modules = list(modules)
    with ExitStack() as undo:
        undo.callback(_watchers.update, {m: _watchers.pop(m) for m in modules if m in _watchers})
        _stand_before(modules, _watchers, make, undo, BASES)
        yield


def replace_attention(
    modules: Iterable[nn.Module], make: Callable[[nn.Module], Attend], undo: ExitStack, bases: Iterable[str] = BASES
) -> None:
    """Let ``make(module)`` answer every module's attention calls until ``undo`` closes.

    Modules without a ``transformers`` config (timm's, VGGT's) must call ``scaled_dot_product_attention`` themselves:
    that call is the one replaced, and only while their forward runs.

    Raises:
        ThriftError: the attention implementation is none of ``bases``, or another session is there.
    """
    modules = list(modules)
    named = [m for m in modules if hasattr(getattr(m, "config", None), "_attn_implementation")]
    _stand_before(named, _replaced, make, undo, tuple(bases))
    for module in modules:
        if module not in named:
            _replace_sdpa(module, make(module), undo)


def _stand_before(
    modules: list[nn.Module],
    place: WeakKeyDictionary[nn.Module, Any],
    make: Callable[[nn.Module], Any],
    undo: ExitStack,
    bases: tuple[str, ...],
) -> None:
    for module in modules:
        if module in place:
            raise ThriftError("another session is installed on this model; leave its with block first")
    configs: dict[int, Any] = {id(m.config): m.config for m in modules}
    for config in configs.values():
        before = config._attn_implementation
        base = before.removeprefix(PREFIX)
        if base not in bases:
            raise ThriftError(
                f"attention implementation '{base}' is not supported; load the model with attn_implementation='sdpa'"
            )
        _register(base)
        undo.callback(setattr, config, "_attn_implementation_internal", before)
        config._attn_implementation_internal = PREFIX + base
    for module in modules:
        undo.callback(place.pop, module, None)
        place[module] = make(module)


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
        watcher, replaced = _watchers.get(module), _replaced.get(module)
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        mask = attention_mask if watcher is None else watcher.before(query, key, attention_mask)
        exotic = ", ".join([name for name in EXOTIC if kwargs.get(name) is not None])
        if exotic:
            _exotic.add(module)
        answer = None if watcher is None or replaced is not None else watcher.answer(query, scaling)
        if answer is not None:
            out = answer.transpose(1, 2), None
        elif replaced is None:
            out = _function(base, module)(module, query, key, value, mask, **kwargs)
        else:
            run = _function(base, module)

            def model_s(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
                return run(module, query, key, value, mask, **{**kwargs, "scaling": scaling})[0].transpose(1, 2)

            model_s.exotic = exotic  # type: ignore[attr-defined]
            out = replaced(cast("Run", model_s), query, key, value, mask, scaling).transpose(1, 2), None
        if watcher is not None:
            watcher.after(query, key, value, mask, scaling)
        return out

    return attention


def _function(base: str, module: nn.Module) -> Callable[..., Any]:
    """The model's own: eager attention is a function of each model's file, not of the shared table."""
    default: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(base, default)
    return found


class OwnCache(DynamicCache):
    """A cache of the library's, for forwards that are not the user's: sessions leave it alone."""


def cache_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The cache that a module is called with, if any, but for our own: its name and place differ between models."""
    cache = kwargs.get("past_key_values")  # what nearly all of them call it
    if not isinstance(cache, Cache):
        cache = next((v for v in (*kwargs.values(), *args) if isinstance(v, Cache)), None)
    return None if isinstance(cache, OwnCache) else cache


def real_tokens(mask: Tensor) -> Tensor:
    """``(batch or 1, tokens)`` bool of a model's 4-D mask, boolean or additive: the last token sees every real one."""
    last = mask[:, 0, -1, :]
    return last if last.dtype == torch.bool else last == 0


@contextmanager
def answered_by(kind: str, modules: Iterable[nn.Module], attention_over: Callable[[str], Any]) -> Iterator[None]:
    """While this is entered, a function of our own answers the modules' attention calls, and makes its masks itself.

    Args:
        kind: name of the function.
        modules: attention modules with a ``transformers`` config.
        attention_over: makes the function, given the implementation that the modules use otherwise.
    """
    configs: dict[int, Any] = {id(m.config): m.config for m in modules}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for key, config in configs.items():
            base = before[key].removeprefix(PREFIX)
            name = f"{PREFIX}{kind}_{base}"
            if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
                AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
                AttentionInterface.register(name, attention_over(base))
            config._attn_implementation_internal = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def _replace_sdpa(module: nn.Module, attend: Attend, undo: ExitStack) -> None:
    """Answer the calls of ``scaled_dot_product_attention`` during this module's forward."""
    own = vars(module).get("forward")
    forward = module.forward

    # Not by hooks: what is interrupted from the keyboard skips them, and the mode would stay.
    def replaced(*args: Any, **kwargs: Any) -> Any:
        with _ReplaceSDPA(attend):
            return forward(*args, **kwargs)

    undo.callback(vars(module).pop, "forward", None) if own is None else undo.callback(setattr, module, "forward", own)
    module.forward = replaced


class _ReplaceSDPA(TorchFunctionMode):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        call = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale"), args, strict=False))
        query, key, value, mask, scale = (
            {**call, **kwargs}.get(n) for n in ("query", "key", "value", "attn_mask", "scale")
        )
        rest = {k: v for k, v in {**call, **kwargs}.items() if k not in ("query", "key", "value", "attn_mask", "scale")}
        assert query is not None and key is not None and value is not None
        scaling = query.shape[-1] ** -0.5 if scale is None else scale

        def model_s(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            return func(query, key, value, attn_mask=mask, scale=scaling, **rest)

        model_s.exotic = ""  # type: ignore[attr-defined]
        return self.attend(cast("Run", model_s), query, key, value, mask, scaling)
