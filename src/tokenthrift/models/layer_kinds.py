"""What a model's layers keep of the tokens that they have read, and which of them keep keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..core.errors import ThriftError
from .decoder import find_attentions

if TYPE_CHECKING:
    from .decoder import DecoderAdapter

PLAIN = ("full_attention", "sliding_attention", "chunked_attention", "attention")
"""Layers that keep the keys and values of every head, as configurations call them."""
STATES = ("linear_attention", "conv", "mamba")
"""Layers that keep a state of one size however many tokens came."""
EMPTY = ("moe", "mlp")
"""Layers that keep nothing."""
RECURRENT = ("rwkv", "xlstm")
"""Types of models whose configurations do not say that all their layers keep states."""


def check_kinds(model: Any, what: str, *, states: bool) -> None:
    """Refuse a model with a layer that keeps something else than keys and values.

    Args:
        what: that needs them, as in ``"cache=snapkv"``.
        states: layers that keep a state are no hindrance, beside others with full attention.

    Raises:
        ThriftError: names the first such layer, its class and its kind.
    """
    odd, types = odd_layers(model), layer_types(model)
    if states and {"full_attention", "attention"} & set(types):
        odd = {i: said for i, said in odd.items() if types[i] not in STATES}
    if odd:
        raise ThriftError(
            f"{what} cannot work on {type(model).__name__}: its {next(iter(odd.values()))}; leave it out, or choose a "
            "model whose layers have standard attention"
        )


def check_windows(adapter: DecoderAdapter, what: str, instead: str) -> None:
    """Refuse a model with a sliding window.

    Args:
        what: that cannot have one, as in ``"prefill=fastv"``.
        instead: what to use, as in ``"connector=divprune"``.

    Raises:
        ThriftError: says so.
    """
    if any(window is not None for window in adapter.costs.windows):
        kind = type(adapter.model).__name__
        raise ThriftError(f"{what} needs layers with full attention; {kind} has sliding windows: use {instead}")


def odd_layers(model: Any) -> dict[int, str]:
    """The layers that keep something else than keys and values; of each its class, its kind, and what it keeps."""
    odd = {
        i: f"layer {i} ({_class_of(model, i)}) has {_kind(kind)}"
        for i, kind in enumerate(layer_types(model))
        if kind not in PLAIN + EMPTY
    }
    for module in find_attentions(model):
        if getattr(module, "kv_lora_rank", None) is not None:
            latent = "multi-head latent attention (MLA), which keeps latents in place of keys and values"
            odd[int(module.layer_idx)] = f"layer {module.layer_idx} ({type(module).__name__}) has {latent}"  # type: ignore[arg-type]
    return dict(sorted(odd.items()))


def layer_types(model: Any) -> list[str]:
    """The kind of every layer, in the words of the configuration; full attention where it has none."""
    config = model.config.get_text_config(decoder=True)
    kind = "linear_attention" if config.model_type in RECURRENT else "full_attention"
    return list(getattr(config, "layer_types", None) or [kind] * (getattr(config, "num_hidden_layers", None) or 0))


def _kind(kind: str) -> str:
    if kind in STATES:
        words = "a convolution" if kind == "conv" else "linear attention"
        return f"{words}, which keeps a state in place of keys and values"
    if kind.startswith("hybrid"):
        return "linear attention beside its attention, which keeps a state beside keys and values"
    return f"{kind.replace('_', ' ')}, which keeps more than keys and values"


def _class_of(model: Any, layer: int) -> str:
    """The class of the module that mixes tokens in a layer; of the whole layer where its parts have no number."""
    numbered = [m for m in model.modules() if getattr(m, "layer_idx", None) == layer]
    inner = [m for m in numbered if not any(other is not m and other in m.modules() for other in numbered)]
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > layer]
    return type([*inner, *(stack[layer] for stack in stacks), model][0]).__name__
