"""What a vision encoder computed inside some of its layers, for methods that rank visual tokens by it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ThriftError
from ..ops.encoder_attention import received_attention, row_attention
from .attention import Watcher, real_tokens, watching_instead
from .pictures import Picture

ATTENTION = ("cls", "received", "keys")
"""Parts of the view that come from a layer's queries and keys."""


Call = tuple[Tensor, Tensor, float, Tensor | None]


@dataclass
class Watched:
    """Of one layer: queries, keys, scaling and real tokens of each of its attention calls, and its output."""

    calls: list[Call] = field(default_factory=list)
    hidden: Tensor | None = None


class _Note(Watcher):
    def __init__(self, watched: Watched) -> None:
        self.watched = watched

    def after(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> None:
        real = None if mask is None else real_tokens(mask).expand(len(key), -1)
        self.watched.calls.append((query.detach(), key.detach(), scaling, real))


@contextmanager
def watching_layers(layers: Sequence[nn.Module], which: Iterable[int], needs: set[str]) -> Iterator[dict[int, Watched]]:
    """While this is entered, note what methods may ask of the encoder's layers ``which``."""
    seen = {layer % len(layers): Watched() for layer in which}
    with ExitStack() as undo:
        if needs & set(ATTENTION):
            modules = {attention_of(layers[i]): watched for i, watched in seen.items()}
            undo.enter_context(watching_instead(modules, lambda module: _Note(modules[module])))
        if "hidden" in needs:
            for i, watched in seen.items():
                # In front, so that it is the layer's own output, before a vision method may reduce it.
                undo.callback(layers[i].register_forward_hook(_keep_output(watched)).remove)
        yield seen


def _keep_output(watched: Watched) -> Any:
    def keep(module: nn.Module, args: Any, out: Any) -> None:
        watched.hidden = (out[0] if isinstance(out, tuple) else out).detach()

    return keep


def attention_of(layer: nn.Module) -> nn.Module:
    """The module of an encoder's layer that calls the attention function."""
    return next(m for m in layer.modules() if hasattr(m, "is_causal") and hasattr(m, "config"))


@dataclass
class EncoderParts:
    """The parts of a view that come from the encoder, for pictures of one layout.

    Attributes:
        watched: by layer.
        count: layers of the encoder.
        prefix: tokens at the start of each of the encoder's rows that are no patches; the first is the CLS token.
        flat: the patches of all images are one sequence, in blocks of ``unit``, the patches of a token.
        order: which block stands at each place of that sequence; None = they stand in their order.
        name: the encoder's class.
    """

    watched: dict[int, Watched]
    count: int
    prefix: int
    flat: bool
    unit: int
    order: Tensor | None
    name: str

    def cls(self, layer: int, pictures: Sequence[Picture]) -> Tensor:
        """``(batch, heads, n)``; see :class:`~tokenthrift.core.view.View`."""
        if not self.prefix:
            raise ThriftError(
                f"{self.name} has no CLS token to rank visual tokens by: use a method that needs none, such as hiprune "
                "or divprune"
            )
        (query, key, scaling, real), *_ = self._calls(layer)
        rows = row_attention(query[:, :, 0], key, scaling, real)[..., self.prefix :]
        return self._pooled(rows.transpose(1, 2), pictures).transpose(1, 2)

    def received(self, layer: int, pictures: Sequence[Picture]) -> Tensor:
        """``(batch, n)``; where attention stays within windows, queries outside give nothing, nor does padding."""
        calls = self._calls(layer)
        sums = torch.cat([received_attention(*call) for call in calls], dim=-1)
        pooled = self._pooled(self._ordered(sums[:, self.prefix :, None]), pictures).squeeze(-1)
        return pooled / (pooled.shape[-1] * self.unit if self.flat else sums.shape[-1])

    def keys(self, layer: int, pictures: Sequence[Picture]) -> Tensor:
        """``(batch, heads, n, head_dim)``."""
        key = torch.cat([key for _, key, *_ in self._calls(layer)], dim=2)
        flat = self._ordered(key.transpose(1, 2).flatten(2)[:, self.prefix :])
        return self._pooled(flat, pictures).unflatten(-1, (key.shape[1], -1)).transpose(1, 2)

    def hidden(self, layer: int, pictures: Sequence[Picture]) -> Tensor:
        """``(batch, n, width)``."""
        hidden = self._watched(layer).hidden
        assert hidden is not None, "a method that reads hidden states has 'hidden' in its needs"
        hidden = hidden[None] if hidden.dim() == 2 else hidden
        return self._pooled(self._ordered(hidden[:, self.prefix :]), pictures)

    def _watched(self, layer: int) -> Watched:
        found = self.watched.get(layer % self.count)
        if found is None:
            known = ", ".join(map(str, self.watched)) or "none"
            raise ThriftError(f"layer {layer} of {self.name} was not watched ({known} were): name it in encoder_layers")
        return found

    def _calls(self, layer: int) -> list[Call]:
        calls = self._watched(layer).calls
        if not calls:
            raise ThriftError(f"the attention of {self.name} cannot be read: use a method that needs only features")
        return calls

    def _ordered(self, x: Tensor) -> Tensor:
        if self.order is None:
            return x
        blocks = x.unflatten(1, (-1, self.unit))
        out = torch.empty_like(blocks)
        out[:, self.order] = blocks
        return out.flatten(1, 2)

    def _pooled(self, patches: Tensor, pictures: Sequence[Picture]) -> Tensor:
        pools = [p.pool for p in pictures if p.pool is not None]
        if len(pools) < len(pictures):
            raise ThriftError(f"which patches of {self.name} stand behind its visual tokens is not known here")
        return torch.stack([pool(patches) for pool in pools])
