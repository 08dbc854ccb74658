"""The adapter of decoder-only language models whose attention dispatches through ``AttentionInterface``."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property
from typing import Any

from torch import nn

from ..core.costs import DecoderCosts
from ..core.errors import ThriftError
from ..core.session import Session
from .counting import install_counter


class DecoderAdapter:
    """Finds the attention modules by what they have in common: a ``layer_idx`` and a ``config``.

    No model class is named: Llama, Qwen, Mistral, Gemma, Phi-3, GPT-NeoX, OLMo and their likes all fit.
    """

    stages = ("prefill", "cache", "attention", "decode")

    def __init__(self, model: Any) -> None:
        self.model = model
        self.attentions = find_attentions(model)
        self._counting = False

    @classmethod
    def fits(cls, model: Any) -> bool:
        """True for models that generate text and whose attention goes through ``AttentionInterface``."""
        return bool(
            getattr(model, "can_generate", lambda: False)()
            and not getattr(model.config, "is_encoder_decoder", False)
            and getattr(model, "_supports_attention_backend", False)
            and find_attentions(model)
        )

    @cached_property
    def costs(self) -> DecoderCosts:
        return DecoderCosts.of(self.model)

    def install(self, stage: str, methods: list[Any], session: Session, undo: ExitStack) -> None:
        """See :class:`tokenthrift.core.session.Adapter`."""
        if len(methods) > 1:
            raise ThriftError(f"stage '{stage}' takes one method at a time here, the plan has {len(methods)}")
        self.count(session, undo)
        if stage == "cache":
            from .cache_stage import install_cache

            install_cache(self, methods[0], session, undo)
        elif stage == "attention":
            from .attention_stage import install_attention

            install_attention(self, methods[0], session, undo)
        elif stage == "prefill":
            from .prefill_stage import install_prefill

            install_prefill(self, methods[0], session, undo)
        else:
            from .decode_stage import install_decode

            install_decode(self, methods[0], session, undo)

    def count(self, session: Session, undo: ExitStack) -> None:
        """Let the session count forwards, however many stages ask for it."""
        if not self._counting:
            self._counting = True
            undo.callback(setattr, self, "_counting", False)
            install_counter(self, session, undo)


def context_length(model: Any) -> int | None:
    """The longest sequence, in tokens, that a model's positions allow; None where nothing limits it."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def find_attentions(model: Any) -> list[nn.Module]:
    """The self-attention modules of the decoder layers, in layer order."""
    found = [
        m
        for m in model.modules()
        if isinstance(getattr(m, "layer_idx", None), int) and hasattr(m, "config") and hasattr(m, "is_causal")
    ]
    return sorted(found, key=lambda m: int(m.layer_idx))
