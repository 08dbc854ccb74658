"""Which product linear layers take, for float32 on a CPU.

A forward of a few tokens, such as one that verifies a draft, is bound by reading the weights. PyTorch's default product
(MKL in its x86 builds) is, on some processors, far from that bound for 2 to 64 rows; oneDNN, which PyTorch ships as
well, is near it, and nearer still with weights arranged beforehand. Results differ by rounding (about 1e-6 of their
size), as those of forwards of different widths do anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from time import perf_counter
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..core.errors import ThriftError, did_you_mean

PRODUCTS = ("auto", "torch", "onednn", "prepacked")
ROWS = 16
"""Rows of a product that prepacked weights are arranged for; they serve fewer and more as well."""
WORTH_MEASURING = 1 << 18
"""Weights of a layer below which "auto" changes nothing: they stay in the processor's cache, whatever the product."""


def use_product(model: nn.Module, product: str, undo: ExitStack) -> tuple[str, int]:
    """Let the model's linear layers take this product until ``undo`` closes.

    Layers that are not plain float32 ``nn.Linear`` modules on a CPU keep PyTorch's own; so does every layer where a
    gradient is asked for, or where a prepacked weight was changed since.

    Args:
        model: whose layers.
        product: ``"torch"`` leaves the model alone, ``"onednn"`` takes no memory, ``"prepacked"`` a second copy of the
            layers' weights; ``"auto"`` is ``"onednn"`` for layers of those shapes at which a short measurement finds it
            faster here, and ``"torch"`` for the others.
        undo: what gives the layers their own product back.

    Returns:
        The product that is in use, ``"onednn"`` if any layer takes it, and the bytes of copies.

    Raises:
        ThriftError: no such product; or one was asked for by name and there is no layer that can take it, or this build
            of PyTorch has no oneDNN.
    """
    if product not in PRODUCTS:
        raise ThriftError(f"unknown product linears='{product}': {did_you_mean(product, PRODUCTS)}")
    if product == "torch":
        return "torch", 0
    layers = [m for m in model.modules() if _fits(m)]
    available = torch.backends.mkldnn.is_available()
    if product == "auto":
        layers = _faster_with_onednn(layers) if available else []
        if not layers:
            return "torch", 0
        product = "onednn"
    if not available:
        raise ThriftError(f"linears='{product}' needs a build of PyTorch with oneDNN, this has none: use 'torch'")
    if not layers:
        raise ThriftError(
            f"linears='{product}' is for float32 linear layers on a CPU, {type(model).__name__} has none: use 'torch'"
        )
    copies: dict[int, Tensor] = {}  # tied weights once
    for layer in layers:
        weight = layer.weight.detach()
        if product == "prepacked" and weight.data_ptr() not in copies:
            copies[weight.data_ptr()] = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        undo.callback(vars(layer).pop, "forward", None)
        vars(layer)["forward"] = _forward(layer, copies.get(weight.data_ptr()))
    return product, sum(copy.numel() * copy.element_size() for copy in copies.values())


def _fits(module: nn.Module) -> TypeGuard[nn.Linear]:
    return (
        type(module) is nn.Linear
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and module.weight.is_contiguous()
        and "forward" not in vars(module)
    )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN's product, with weights as they are or arranged beforehand."""
    op: Any = torch.ops.mkldnn._linear_pointwise
    out: Tensor = op(x, weight, bias, "none", [], "")
    return out


def _forward(layer: nn.Linear, packed: Tensor | None) -> Callable[[Tensor], Tensor]:
    weight, version = layer.weight, layer.weight._version

    def forward(x: Tensor) -> Tensor:
        stale = packed is not None and (layer.weight is not weight or weight._version != version)
        if stale or torch.is_grad_enabled() or x.dtype != torch.float32 or not x.numel():
            return linear(x, layer.weight, layer.bias)
        return _multiply(x, layer.weight if packed is None else packed, layer.bias)

    return forward


_measured: dict[tuple[tuple[int, ...], int], bool] = {}
"""By the shape of the weights and the number of threads."""


@torch.no_grad()
def _faster_with_onednn(layers: list[nn.Linear], rows: int = 8, most: int = 16) -> list[nn.Linear]:
    """The layers whose product with a few rows oneDNN makes faster, measured on some layers of every shape."""
    by_shape: dict[tuple[int, ...], list[nn.Linear]] = {}
    for layer in layers:
        by_shape.setdefault(tuple(layer.weight.shape), []).append(layer)
    threads, faster = torch.get_num_threads(), []
    for shape, alike in by_shape.items():
        if alike[0].weight.numel() < WORTH_MEASURING:
            continue
        if (shape, threads) not in _measured:
            weights = [layer.weight for layer in alike[:most]]
            _measured[shape, threads] = _onednn_is_faster(weights, torch.zeros(rows, shape[1]))
        if _measured[shape, threads]:
            faster += alike
    return faster


def _onednn_is_faster(weights: list[Tensor], x: Tensor) -> bool:
    def seconds(product: Callable[..., Tensor]) -> float:
        start = perf_counter()
        for weight in weights:
            product(x, weight, None)
        return perf_counter() - start

    times = [(seconds(linear), seconds(_multiply)) for _ in range(7)][1:]  # the first warms up
    default, ours = (min(column) for column in zip(*times, strict=True))
    return ours < default
