"""Weights in the layout that oneDNN multiplies fastest, made once instead of at every call: for float32 on a CPU.

A forward of a few tokens, such as one that verifies a draft, is bound by reading the weights. The default product of so
few rows rearranges them each time; with weights arranged beforehand a forward of 8 tokens takes little longer than one
of a single token. It costs a second copy of the linear layers' weights, as long as the session lasts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..core.errors import ThriftError

ROWS = 16
"""Rows of a product that the layout is made for; it serves fewer and more as well."""


def prepack_linears(model: nn.Module, undo: ExitStack) -> int:
    """Let the model's linear layers multiply with weights arranged beforehand, until ``undo`` closes.

    Results differ from the default's by rounding (about 1e-6 of their size). Layers that are not plain float32
    ``nn.Linear`` modules on a CPU stay as they are; where a gradient is asked for, or a weight changed since, the
    default product is taken.

    Returns:
        Bytes of the copies.

    Raises:
        ThriftError: there is no such layer, or this build of PyTorch has no oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        raise ThriftError("prepack needs a build of PyTorch with oneDNN, this one has none: leave it out")
    layers = [m for m in model.modules() if _fits(m)]
    if not layers:
        raise ThriftError(
            f"prepack is for float32 linear layers on a CPU, {type(model).__name__} has none: leave it out"
        )
    copies: dict[int, Tensor] = {}  # tied weights once
    size = 0
    for layer in layers:
        weight = layer.weight.detach()
        if weight.data_ptr() not in copies:
            copies[weight.data_ptr()] = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
            size += weight.nbytes
        undo.callback(vars(layer).pop, "forward", None)
        vars(layer)["forward"] = _product(layer, copies[weight.data_ptr()])
    return size


def _fits(module: nn.Module) -> TypeGuard[nn.Linear]:
    return (
        type(module) is nn.Linear
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and "forward" not in vars(module)
    )


def _product(layer: nn.Linear, packed: Tensor) -> Callable[[Tensor], Tensor]:
    weight, version = layer.weight, layer.weight._version
    multiply: Any = torch.ops.mkldnn._linear_pointwise

    def forward(x: Tensor) -> Tensor:
        stale = layer.weight is not weight or weight._version != version
        if stale or torch.is_grad_enabled() or x.dtype != torch.float32 or not x.numel():
            return linear(x, layer.weight, layer.bias)
        out: Tensor = multiply(x, packed, layer.bias, "none", [], "")
        return out

    return forward
