"""Token attributions of an encoder: its weights found, its hidden states collected, its head taken apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..core.errors import ThriftError
from ..ops.attribution import Affine, EncoderLayer, Norm, decompx, globenc, hand_out, through


def layers_of(model: Any) -> list[EncoderLayer]:
    """The layers of a BERT-type encoder (BERT, RoBERTa, XLM-R, ELECTRA, MiniLM): those built like BERT's.

    Raises:
        ThriftError: it has none.
    """
    names = ("attention.self.query", "attention.output.LayerNorm", "intermediate.dense", "output.LayerNorm")
    found = [m for m in model.modules() if all(_part(m, name) is not None for name in names)]
    if not found or getattr(model.config, "is_decoder", False):
        raise ThriftError(f"{type(model).__name__} is no BERT-type encoder: token attribution reads BERT's layers")
    return [
        EncoderLayer(
            heads=layer.attention.self.num_attention_heads,
            query=_affine(layer.attention.self.query),
            key=_affine(layer.attention.self.key),
            value=_affine(layer.attention.self.value),
            output=_affine(layer.attention.output.dense),
            norm1=_norm(layer.attention.output.LayerNorm),
            up=_affine(layer.intermediate.dense),
            activation=layer.intermediate.intermediate_act_fn,
            down=_affine(layer.output.dense),
            norm2=_norm(layer.output.LayerNorm),
        )
        for layer in found
    ]


def head_of(model: Any) -> tuple[Affine, Callable[[Tensor], Tensor], Affine] | None:
    """The classification head on the first token: a layer, an activation, a layer; None where there is none.

    Raises:
        ThriftError: a head of another kind.
    """
    head = getattr(model, "classifier", None)
    if head is None:
        return None
    pooler = _part(model, f"{model.base_model_prefix}.pooler.dense")
    if isinstance(head, nn.Linear) and pooler is not None:  # BERT's
        return _affine(pooler), torch.tanh, _affine(head)
    if isinstance(getattr(head, "dense", None), nn.Linear) and isinstance(getattr(head, "out_proj", None), nn.Linear):
        activation = getattr(head, "activation", torch.tanh)  # ELECTRA has its own, RoBERTa tanh
        return _affine(head.dense), activation, _affine(head.out_proj)
    raise ThriftError(f"the head of {type(model).__name__} cannot be taken apart: choose a BERT or RoBERTa classifier")


@torch.no_grad()
def globenc_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """GlobEnc's matrix of a batch: ``(batch, tokens, tokens)``."""
    return globenc(layers_of(model), _hidden(model, inputs)[:-1], inputs["attention_mask"].bool())


@torch.no_grad()
def decompx_of(model: Any, inputs: dict[str, Tensor], share: str = "absdot", slope: str = "zero_origin") -> Tensor:
    """DecompX's parts of the last hidden states: ``(batch, i, j, dim)``."""
    mask = inputs["attention_mask"].bool()
    return decompx(layers_of(model), _hidden(model, inputs)[0], mask, share, slope)


@torch.no_grad()
def label_parts(model: Any, parts: Tensor, share: str = "absdot", slope: str = "zero_origin") -> Tensor:
    """What each token contributes to each label: ``(batch, tokens, labels)``, which over tokens sum to the logits.

    Args:
        model: a classifier.
        parts: what :func:`decompx_of` gives.
        share, slope: as there; ``slope`` is that of the head's activation.
    """
    head = head_of(model)
    assert head is not None
    first, activation, last = head
    pooled = hand_out(linear(parts[:, 0], first[0]), first[1], share)
    return hand_out(linear(through(activation, pooled, share, slope), last[0]), last[1], share)


def embedding_parts(parts: Tensor, mask: Tensor) -> Tensor:
    """What each token contributes to the mean of the hidden states, along that mean: ``(batch, tokens)``; they sum to
    its length."""
    weight = mask / mask.sum(-1, keepdim=True)
    of_mean = torch.einsum("bi,bijd->bjd", weight.to(parts.dtype), parts)
    return (of_mean * torch.nn.functional.normalize(of_mean.sum(1), dim=-1).unsqueeze(1)).sum(-1)


def _hidden(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    hidden: tuple[Tensor, ...] = model.base_model(**inputs, output_hidden_states=True).hidden_states
    return hidden


def _part(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _affine(module: Any) -> Affine:
    return module.weight, module.bias


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.bias, module.eps)
