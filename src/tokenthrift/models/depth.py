"""A decoder's layers as something to choose from: run only some of them, and read tokens off any of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..core.errors import ThriftError
from .decoder import find_attentions

_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f")


class Depth:
    """Where a decoder-only model has its layers, the norm after them and its head, found by structure.

    Attributes:
        backbone: the module that runs the layers; its output is the head's input.
        layers: all decoder layers.
        norm: applied after the last of them.
        head: from hidden states to logits. What a model does to its logits afterwards is monotone and left out. None
            where the model is the language model inside another, which has the head.

    Raises:
        ThriftError: the model is laid out otherwise.
    """

    def __init__(self, model: Any) -> None:
        attentions = find_attentions(model)
        head = model.get_output_embeddings()
        for module in model.modules():
            layers = getattr(module, "layers", None)
            norm = next((n for name in _NORMS if (n := getattr(module, name, None)) is not None), None)
            if (
                isinstance(layers, nn.ModuleList)
                and norm is not None
                and (head is not None or not model.can_generate())
                and len(layers) == len(attentions)
                and all(any(m is a for m in layer.modules()) for layer, a in zip(layers, attentions, strict=True))
            ):
                self.backbone, self.layers, self.norm, self.head = module, list(layers), norm, head
                self._lists: dict[tuple[int, ...], nn.ModuleList] = {}
                return
        raise ThriftError(
            f"{type(model).__name__} cannot be run in part: no list of layers with a norm and a head after it was found"
        )

    @property
    def head_layers(self) -> float:
        """What norm and head cost, in layers: by their weights."""
        return _weights(self.head) / max(_weights(self.layers[0]), 1)

    @contextmanager
    def running(self, which: Sequence[int]) -> Iterator[None]:
        """While this is entered, the model has only these layers, in ascending order; what they get and know of their
        place does not change."""
        key = tuple(which)
        if key not in self._lists:
            kept = set(key)
            last = max(kept) + 1
            self._lists[key] = nn.ModuleList(
                layer if i in kept else _Passage(layer) for i, layer in enumerate(self.layers[:last])
            )
        whole = self.backbone._modules["layers"]
        self.backbone._modules["layers"] = self._lists[key]
        try:
            yield
        finally:
            self.backbone._modules["layers"] = whole

    def read(self, hidden: Tensor) -> Tensor:
        """The logits that the model would give if the layer with this output were the last."""
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class _Passage(nn.Module):
    """Stands where a layer is skipped, and shows the attributes of that layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # no child: its weights are not counted, moved or saved twice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


@contextmanager
def watching(modules: Sequence[nn.Module], seen: list[Tensor]) -> Iterator[None]:
    """While this is entered, every module that runs appends its (first) output to ``seen``."""
    handles = [
        m.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for m in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
