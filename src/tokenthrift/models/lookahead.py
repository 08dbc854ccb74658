"""Looking ahead: a prompt runs together with tokens that may follow it, so that caches can be judged by these.

The tokens come from a draft model, or from the first layers of the model itself. They are gone again before anybody
sees them: from the outputs, from every cache layer, and from the count of tokens seen.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..core.costs import DecoderCosts
from ..core.errors import ThriftError
from ..core.session import Session
from .decoder import context_length
from .depth import Depth
from .vocabularies import check_vocabulary

if TYPE_CHECKING:
    from .decoder import DecoderAdapter


class Lookahead:
    """Appends tokens to prompts, and takes them away again.

    Attributes:
        tokens: how many were appended in the forward that runs now.
        drafting: a draft is being written, which is nothing to watch.

    Args:
        method: has ``draft(ids, mask)``, which gives the tokens to append ``(batch, some)`` or None for none, and
            ``cost(prompt, tokens)``, the FLOPs of that.
        adapter: of the model.
        session: counts what this costs.
    """

    def __init__(self, method: Any, adapter: DecoderAdapter, session: Session) -> None:
        self.method, self.adapter, self.session = method, adapter, session
        self.name = method.info.name
        self.tokens = 0
        self.drafting = False

    def install(self, undo: ExitStack) -> None:
        """Hook the model's body, below its head, until ``undo`` closes."""
        body = self.adapter.model.base_model
        undo.callback(body.register_forward_pre_hook(self._extend, with_kwargs=True).remove)
        undo.callback(body.register_forward_hook(self._crop).remove)

    def _extend(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.drafting:
            return None
        self.tokens = 0
        cache, used = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if used is None:
            used = getattr(body.config, "use_cache", True)
        if not used or (cache is not None and cache.get_seq_length() > 0):
            return None
        ids, mask = args[0] if args else kwargs.get("input_ids"), kwargs.get("attention_mask")
        if ids is None:
            raise ThriftError(f"{self.name} drafts from token ids: pass input_ids, not inputs_embeds")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise ThriftError(f"{self.name} needs attention_mask as (batch, tokens): use the default cache and mask")
        if ids.shape[1] == 1:
            return None
        self.drafting = True
        try:
            ahead = self.method.draft(ids, mask)
        finally:
            self.drafting = False
        if ahead is None:
            return None
        self.tokens = ahead.shape[1]
        self._count(*ids.shape)
        kwargs = {**kwargs, "input_ids": torch.cat([ids, ahead], dim=1)}
        if mask is not None:
            kwargs["attention_mask"] = pad(mask, (0, self.tokens), value=1)
        if (positions := kwargs.get("position_ids")) is not None:
            steps = torch.arange(1, self.tokens + 1, device=ids.device)
            kwargs["position_ids"] = torch.cat([positions, positions[..., -1:] + steps], dim=-1)
        return args[1:], kwargs

    def _crop(self, body: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.drafting or not self.tokens:
            return None
        n, self.tokens = -self.tokens, 0
        if isinstance(output, tuple):
            return (output[0][:, :n], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, :n]
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(h[:, :n] for h in output.hidden_states)
        if getattr(output, "attentions", None) is not None:
            output.attentions = tuple(a if a is None else a[..., :n, :n] for a in output.attentions)
        return output

    def _count(self, batch: int, n: int) -> None:
        costs, all = self.adapter.costs, n + self.tokens
        behind = costs.flops(all, all, 0) - costs.flops(n, n, 0)
        self.session.flops += batch * (behind + self.method.cost(n, self.tokens))

    def mend(self, layer: Any, key: Tensor, value: Tensor) -> None:
        """Take the appended tokens out of a sliding-window layer, which let go of prompt tokens for them."""
        keep = slice(None) if layer.sliding_window < 2 else slice(-layer.sliding_window + 1, None)
        layer.keys, layer.values = (t[:, :, : -self.tokens][:, :, keep].clone() for t in (key, value))
        layer.cumulative_length -= self.tokens


def check_layers(name: str, model: Any) -> None:
    """Raise ThriftError for models with layers from which tokens cannot be taken back."""
    for i, layer in enumerate(DynamicCache(config=model.config).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ThriftError(
                f"{name} looks ahead, and layer {i} of {type(model).__name__} keeps a {type(layer).__name__}, from "
                "which tokens cannot be taken back: use a cache method that does not look ahead, such as snapkv"
            )


class Writer:
    """Goes on with prompts greedily, and leaves no trace.

    Args:
        name: of the method, for errors.
        target: the model whose prompts these are.
        draft: another model with the same vocabulary; None is the target itself.
        layers: how many of its first layers the target runs for that; None is half of them.
        tokenizer: of the draft model, if it is known.

    Raises:
        ThriftError: the draft model does not generate text or has another vocabulary, or the target has fewer layers.
    """

    def __init__(
        self, name: str, target: Any, draft: Any = None, layers: int | None = None, tokenizer: Any = None
    ) -> None:
        self.model = target if draft is None else draft
        self.depth = None
        if draft is None:
            self.depth = Depth(target)
            most = len(self.depth.layers)
            self.exit = (most + 1) // 2 if layers is None else layers
            if self.exit > most:
                raise ThriftError(f"{name} was told to run {layers} layers: {type(target).__name__} has {most}")
            return
        if not getattr(draft, "can_generate", lambda: False)() or draft.config.is_encoder_decoder:
            raise ThriftError(f"{type(draft).__name__} cannot draft for {name}: choose a causal language model")
        check_vocabulary(name, target, draft, draft_tokenizer=tokenizer)

    def cost(self, n: int, tokens: int) -> float:
        """FLOPs of :meth:`write` for one row of ``n`` tokens."""
        costs = DecoderCosts.of(self.model)
        steps = costs.flops(n, n, 1) + sum(costs.flops(1, n + i, 1) for i in range(1, tokens))
        return steps if self.depth is None else steps * self.exit / len(self.depth.layers)

    @torch.no_grad()
    def write(self, ids: Tensor, mask: Tensor | None, tokens: int) -> Tensor | None:
        """``(batch, tokens)`` int64, fewer where the positions of the model end; None if there is no room at all."""
        room = (context_length(self.model) or 10**9) - ids.shape[1]
        tokens = min(tokens, room)
        if tokens < 1:
            return None
        mask = torch.ones_like(ids) if mask is None else mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache, new, written = DynamicCache(config=self.model.config), ids, []
        while True:
            written.append(self._next(new, mask, positions, cache))
            if len(written) == tokens:
                return torch.cat(written, dim=1)
            new, mask, positions = written[-1], pad(mask, (0, 1), value=1), positions[:, -1:] + 1

    def _next(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        if self.depth is None:
            device = self.model.device
            inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
            logits = self.model(input_ids=ids.to(device), logits_to_keep=1, **inputs).logits[:, -1]
        else:
            with self.depth.running(range(self.exit)):
                hidden = self.depth.backbone(input_ids=ids, **inputs).last_hidden_state
            logits = self.depth.head(hidden[:, -1])
        return logits.argmax(-1, keepdim=True).to(ids.device)
