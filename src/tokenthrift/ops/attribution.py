"""Token attribution in BERT-type encoders (post-norm): what each input token contributes to each output vector.

Two published methods on one layer's weights and hidden states. GlobEnc (arXiv 2205.03286) measures how long the parts
are that attention, residuals and both layer norms hand on, and multiplies these matrices layer by layer. DecompX
(arXiv 2306.02873) carries the parts themselves through all layers, feed-forward networks and biases included, so that
they sum to the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear

Affine = tuple[Tensor, Tensor]
"""Weight ``(out, in)`` and bias ``(out,)``."""
TINY = 1e-12
SHARES = ("absdot", "abssim", "norm")
SLOPES = ("zero_origin", "tangent")


@dataclass(frozen=True)
class Norm:
    """A layer norm."""

    weight: Tensor
    bias: Tensor
    eps: float

    def of_parts(self, parts: Tensor, whole: Tensor) -> Tensor:
        """The norm without its bias, on parts ``(batch, i, j, dim)`` of ``whole`` ``(batch, i, dim)``: linear in them,
        with the statistics of the whole."""
        spread = (whole.var(-1, unbiased=False, keepdim=True) + self.eps).sqrt().unsqueeze(2)
        return (parts - parts.mean(-1, keepdim=True)) / spread * self.weight

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class EncoderLayer:
    """The weights of a post-norm layer: attention, norm, feed-forward network, norm."""

    heads: int
    query: Affine
    key: Affine
    value: Affine
    output: Affine
    norm1: Norm
    up: Affine
    activation: Callable[[Tensor], Tensor]
    down: Affine
    norm2: Norm

    def attention(self, x: Tensor, mask: Tensor) -> Tensor:
        """``(batch, heads, tokens, tokens)`` of the layer's input ``(batch, tokens, dim)``; ``mask`` as for globenc."""
        q, k = (self.split(linear(x, *affine)) for affine in (self.query, self.key))
        logits: Tensor = q @ k.transpose(-1, -2) * float(q.shape[-1]) ** -0.5
        hidden = ~mask[:, None, None]
        return logits.masked_fill(hidden, torch.finfo(x.dtype).min).softmax(-1)

    def split(self, x: Tensor) -> Tensor:
        """``(batch, tokens, dim)`` to ``(batch, heads, tokens, head dim)``."""
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def mixed(self, attention: Tensor, values: Tensor) -> Tensor:
        """What attention sends from token j to token i: ``(batch, i, j, dim)``, of ``values`` ``(batch, j, dim)``."""
        weight = self.output[0].view(len(self.output[0]), self.heads, -1)  # (dim, heads, head dim)
        sent = torch.einsum("bhjc,dhc->bhjd", self.split(values), weight)
        return torch.einsum("bhij,bhjd->bijd", attention, sent)


def globenc(layers: Sequence[EncoderLayer], hidden: Sequence[Tensor], mask: Tensor) -> Tensor:
    """How much of each token is in each output: ``(batch, tokens, tokens)``, not normalised; rows of padding are 0.

    Args:
        layers: of the encoder.
        hidden: the input of each layer, ``(batch, tokens, dim)``.
        mask: ``(batch, tokens)`` bool, true for real tokens.
    """
    total: Tensor | None = None
    for layer, x in zip(layers, hidden, strict=True):
        sent = layer.mixed(layer.attention(x, mask), linear(x, *layer.value))
        before1 = x + sent.sum(2) + layer.output[1]
        after1 = layer.norm1(before1)
        before2 = after1 + linear(layer.activation(linear(after1, *layer.up)), *layer.down)
        parts = layer.norm1.of_parts(sent + _on_diagonal(x), before1)
        lengths = torch.linalg.vector_norm(layer.norm2.of_parts(parts, before2), dim=-1) * mask.unsqueeze(-1)
        total = lengths if total is None else lengths @ total
    assert total is not None
    return total


def decompx(
    layers: Sequence[EncoderLayer],
    embedded: Tensor,
    mask: Tensor,
    share: str = "absdot",
    slope: str = "zero_origin",
) -> Tensor:
    """The part of each token in each output vector: ``(batch, i, j, dim)``, which over j sum to the last hidden states.

    Args:
        layers: of the encoder.
        embedded: the input of the first layer, ``(batch, tokens, dim)``.
        mask: ``(batch, tokens)`` bool, true for real tokens.
        share: how a bias is handed out to the parts: by the size of their dot product with it (``absdot``), of their
            cosine (``abssim``), or by their length (``norm``).
        slope: how an activation is made linear: by the line through the origin (``zero_origin``) or the ``tangent``.
    """
    parts, x = _on_diagonal(embedded), embedded
    for number, layer in enumerate(layers):
        attention = layer.attention(x, mask)
        if number == 0:  # every token still stands alone: the bias of its value is its own
            sent, bias = layer.mixed(attention, linear(x, *layer.value)), layer.output[1]
        else:
            values = linear(parts, layer.value[0])
            values = values.view(*values.shape[:-1], layer.heads, -1)  # (batch, k, j, heads, head dim)
            mixed = torch.einsum("bhik,bkjhc->bijhc", attention, values).flatten(-2)
            sent, bias = linear(mixed, layer.output[0]), linear(layer.value[1], *layer.output)
        parts = hand_out(sent + parts, bias, share)
        before1 = parts.sum(2)
        parts = hand_out(layer.norm1.of_parts(parts, before1), layer.norm1.bias, share)

        inner = hand_out(linear(parts, layer.up[0]), layer.up[1], share)
        inner = through(layer.activation, inner, share, slope)
        parts = parts + hand_out(linear(inner, layer.down[0]), layer.down[1], share)
        parts = hand_out(layer.norm2.of_parts(parts, parts.sum(2)), layer.norm2.bias, share)
        x = parts.sum(2)
    return parts


def hand_out(parts: Tensor, bias: Tensor, share: str) -> Tensor:
    """``(..., j, dim)`` parts with a bias ``(dim,)`` or ``(..., dim)`` handed out to them."""
    bias = bias.unsqueeze(-2) if bias.dim() > 1 else bias
    if share == "norm":
        weight = torch.linalg.vector_norm(parts, dim=-1)
    elif share == "abssim":
        weight = cosine_similarity(parts, bias.expand_as(parts), dim=-1).abs()
    else:
        weight = (parts @ bias.unsqueeze(-1) if bias.dim() == 1 else parts @ bias.transpose(-1, -2)).squeeze(-1).abs()
    weight = weight / (weight.sum(-1, keepdim=True) + TINY)
    return torch.addcmul(parts, weight.unsqueeze(-1), bias)


def through(activation: Callable[[Tensor], Tensor], parts: Tensor, share: str, slope: str) -> Tensor:
    """Parts ``(..., j, dim)`` of what goes into an activation, as parts of what comes out."""
    whole = parts.sum(-2)
    if slope == "zero_origin":
        return parts * (activation(whole) / (whole + TINY)).unsqueeze(-2)
    with torch.enable_grad():
        point = whole.detach().clone().requires_grad_()
        (tangent,) = torch.autograd.grad(activation(point).sum(), point)
    return hand_out(parts * tangent.unsqueeze(-2), activation(whole) - tangent * whole, share)


def _on_diagonal(x: Tensor) -> Tensor:
    """``(batch, tokens, dim)`` as parts: every token is a part of itself alone."""
    return torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[:, :, None] * x.unsqueeze(1)
