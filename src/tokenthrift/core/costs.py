"""Analytic costs: FLOPs of transformer layers and bytes of KV caches. A multiply-add counts as two FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


def linear_flops(module: nn.Module, tokens: int = 1) -> int:
    """FLOPs of all linear layers inside ``module`` for ``tokens`` tokens (biases, norms, activations left out)."""
    weights = (m.weight for m in module.modules() if isinstance(m, nn.Linear))
    return 2 * tokens * sum(w.numel() for w in weights)


def attention_flops(queries: int, keys: int, heads: int, head_dim: int) -> int:
    """FLOPs of ``QK^T`` and ``AV`` over all ``heads``, full (a causal mask saves none in the usual kernels)."""
    return 4 * queries * keys * heads * head_dim


def kv_bytes(tokens: int, kv_heads: int, head_dim: int, bytes_per_value: int, layers: int = 1, batch: int = 1) -> int:
    """Bytes of keys and values for ``tokens`` entries per head."""
    return 2 * batch * layers * kv_heads * tokens * head_dim * bytes_per_value


@dataclass(frozen=True)
class DecoderCosts:
    """Per-model constants of a decoder-only model, from which the cost of any forward follows."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    per_token: int
    """Linear FLOPs per token, output head left out."""
    per_logit: int
    """FLOPs of the output head per position that gets logits."""
    windows: tuple[int | None, ...] = ()
    """Per layer, the last tokens that a query sees, itself included; None (or no entry) for all."""

    @classmethod
    def of(cls, model: Any) -> DecoderCosts:
        """Read from a ``transformers`` causal language model."""
        config = model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        head = model.get_output_embeddings()
        head_flops = linear_flops(head) if head is not None else 0
        return cls(
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            per_token=linear_flops(model) - head_flops,
            per_logit=head_flops,
            windows=_windows(config),
        )

    def flops(self, queries: int, keys: int | list[int], logits: int | None = None) -> int:
        """One forward of ``queries`` new tokens per row that attend to ``keys`` entries (an int, or one per layer).

        An int is the full length, the new tokens included: layers with a sliding window see less of it. ``logits`` is
        the number of positions for which the head runs, all of them when None.
        """
        per_layer = [k + queries for k in self._cached(keys - queries)] if isinstance(keys, int) else keys
        attention = attention_flops(queries, sum(per_layer), self.heads, self.head_dim)
        return queries * self.per_token + attention + (queries if logits is None else logits) * self.per_logit

    def kv_bytes(self, tokens: int, bytes_per_value: int, batch: int = 1) -> int:
        """Bytes of a full cache after ``tokens`` tokens; layers with a sliding window hold only the last of them."""
        return kv_bytes(sum(self._cached(tokens)), self.kv_heads, self.head_dim, bytes_per_value, batch=batch)

    def _cached(self, tokens: int) -> list[int]:
        """Entries that each layer's cache holds after ``tokens`` tokens: a window's last place is the next query's."""
        windows = self.windows or (None,) * self.layers
        return [tokens if w is None else min(tokens, w - 1) for w in windows]


def _windows(config: Any) -> tuple[int | None, ...]:
    """As ``DynamicCache`` reads a configuration."""
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    usual = "sliding_attention" if window else "chunked_attention" if chunk else "full_attention"
    of_type = {"sliding_attention": window, "chunked_attention": chunk}
    layers = getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers
    return tuple(of_type.get(layer) for layer in layers)
