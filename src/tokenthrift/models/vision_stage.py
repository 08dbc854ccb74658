"""The vision stage: reduces patch tokens between attention and MLP of every encoder layer, by hooks alone.

A pre-norm layer computes ``h = x + attention(x)`` and returns ``h + mlp(h)``. Hooks cannot shorten the residual ``h``,
but with a reduction ``M`` and a lift ``U`` for which ``M U = I`` they need not: ``M (h + U mlp(M h)) = M h + mlp(M h)``
is the layer with its tokens reduced between attention and MLP. So the second norm gets ``M h``, the output of the MLP
is lifted with ``U``, and the layer's output is reduced with ``M``. The identity holds for pruning and merging, with any
LayerScale after the MLP; the MLP runs on the few tokens only.

A method of this stage has ``reduce(view) -> TokenMap | None``: None leaves the layer as it is, and then nothing is
computed for it. Protected tokens must come out first, in their order. A method whose ``prop_attn`` is true gets
proportional attention: ``log(size)`` is added to the attention scores, so a token counts as often as it has patches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial, reduce
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.costs import attention_flops, linear_flops
from ..core.errors import ThriftError
from ..core.session import Session
from ..core.tokenmap import TokenMap
from ..core.view import Lazy, View
from .encoder import part

if TYPE_CHECKING:
    from .encoder import EncoderAdapter


def install_vision(adapter: EncoderAdapter, method: Any, session: Session, undo: ExitStack) -> None:
    """Reduce the encoder's tokens with ``method`` until ``undo`` closes.

    Raises:
        ThriftError: the method wants proportional attention, and the model's attention takes no additive mask.
    """
    attention = adapter.encoder.config._attn_implementation
    if getattr(method, "prop_attn", False) and attention not in ("sdpa", "eager"):
        raise ThriftError(
            f"proportional attention needs sdpa or eager attention, the model uses {attention}: "
            "call model.set_attn_implementation('sdpa'), or set prop_attn=False"
        )
    _Runtime(adapter, method, session).attach(undo)


@dataclass
class _Forward:
    """What is known during one forward of the encoder. A new one each time, so that no forward affects the next."""

    grid: tuple[int, int, int] = (0, 0, 0)
    tokens: int = 0
    """At the start; ``batch`` the number of images."""
    batch: int = 0
    widths: list[tuple[int, int]] = field(default_factory=list)
    """Per layer: tokens in attention, tokens in the MLP."""
    maps: list[TokenMap] = field(default_factory=list)
    sizes: Tensor | None = None
    """Per token, how many it stands for: ``(batch, tokens)``; None = all one."""
    bias: Tensor | None = None
    """To be added to the attention scores: ``(batch, 1, 1, tokens)``."""
    masked: bool = False
    """The user gave an attention mask."""
    seen: dict[str, Tensor] = field(default_factory=dict)
    """Outputs of this layer's query and key projections."""
    map: TokenMap | None = None
    """The reduction of the layer that is running."""
    seconds: float = 0.0

    @property
    def prefix(self) -> int:
        return self.tokens - self.grid[1] * self.grid[2]

    @cached_property
    def composed(self) -> TokenMap:
        """All layers' maps so far, as one."""
        return reduce(TokenMap.then, self.maps)

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.seconds += time.perf_counter() - self._started


class _Runtime:
    """The hooks of one session. All state of a forward is in ``self.now``."""

    def __init__(self, adapter: EncoderAdapter, method: Any, session: Session) -> None:
        self.encoder, self.family, self.layers = adapter.encoder, adapter.family, adapter.layers
        self.method = method
        self.session = session
        self.inside = adapter.encoder is not adapter.model
        self.now: _Forward | None = None
        self.patches = part(self.encoder, self.family.patches)
        self.attentions = [part(layer, self.family.attention) for layer in self.layers]
        self.mlps = [part(layer, self.family.mlp) for layer in self.layers]
        self.costs = [(linear_flops(a), linear_flops(m)) for a, m in zip(self.attentions, self.mlps, strict=True)]
        needs = set(method.info.needs)
        self.wanted = [p for p, parts in PROJECTIONS.items() if needs & parts]

    def attach(self, undo: ExitStack) -> None:
        def hook(register: Callable[..., Any], function: Callable[..., Any], **how: Any) -> None:
            undo.callback(register(function, **how).remove)

        hook(self.encoder.register_forward_pre_hook, self.begin)
        hook(self.encoder.register_forward_hook, self.finish, always_call=True)  # after an exception, to forget
        hook(self.patches.register_forward_hook, self.see_grid)
        pool = getattr(self.encoder, self.family.pool, None) if self.family.pool else None
        if pool is not None:
            hook(pool.register_forward_pre_hook, self.before_pool)
        for i, layer in enumerate(self.layers):
            hook(layer.register_forward_pre_hook, partial(self.before_layer, i), with_kwargs=True)
            for name in self.wanted:
                hook(part(self.attentions[i], name).register_forward_hook, partial(self.see_projection, name))
            hook(part(layer, self.family.norm).register_forward_pre_hook, partial(self.before_norm, i))
            hook(self.mlps[i].register_forward_hook, self.after_mlp)
            # In front, so that the hooks by which transformers collects hidden states see the reduced ones.
            hook(layer.register_forward_hook, self.after_layer, prepend=True)
        undo.callback(self.drop_state)

    def drop_state(self) -> None:
        self.now = None

    # ---- around the encoder -----------------------------------------------------------------------------------------

    def begin(self, encoder: nn.Module, args: tuple[Any, ...]) -> None:
        self.now = _Forward()

    def see_grid(self, patches: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if self.now is not None:
            self.now.grid = (1, out.shape[-2], out.shape[-1])

    def before_pool(self, pool: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.now is None or not self.now.maps:
            return None
        return self.now.composed.unmerge(args[0]), *args[1:]

    def finish(self, encoder: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        now, self.now = self.now, None
        if now is None or out is None or not now.widths:
            return None
        self.write(now)
        if not (now.maps and self.inside):
            return None
        if isinstance(out, tuple):
            return now.composed.unmerge(out[0]), *out[1:]
        out.last_hidden_state = now.composed.unmerge(out.last_hidden_state)
        return out

    def write(self, now: _Forward) -> None:
        """Tell the session what happened."""
        device = self.patches.weight.device
        self.session.start_maps("vision")
        for map in now.maps or [TokenMap.identity(now.tokens, (now.batch,), device)]:
            self.session.add_map("vision", map)
        left = now.widths[-1][1]
        self.session.record("vision", before=now.batch * now.tokens, after=now.batch * left, seconds=now.seconds)
        dense = [(now.tokens, now.tokens)] * len(now.widths)
        self.session.count_forward(self.flops(now, now.widths), self.flops(now, dense))

    def flops(self, now: _Forward, widths: list[tuple[int, int]]) -> int:
        """Of the patch embedding and the layers, in which attention and MLP have these numbers of tokens."""
        total: int = 2 * self.patches.weight.numel() * now.grid[1] * now.grid[2]
        for attention, (of_attention, of_mlp), (n, m) in zip(self.attentions, self.costs, widths, strict=True):
            heads = attention.k_proj.out_features // attention.head_dim
            total += n * of_attention + attention_flops(n, n, heads, attention.head_dim) + m * of_mlp
        return now.batch * total

    # ---- around a layer ---------------------------------------------------------------------------------------------

    def before_layer(self, i: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self.now
        if now is None:
            return None
        if i == 0:
            now.batch, now.tokens = args[0].shape[:2]
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        now.masked = now.masked or mask is not None
        now.map = None
        if now.bias is None:
            return None
        bias = now.bias.to(args[0].dtype)
        return ((args[0], bias, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "attention_mask": bias})

    def see_projection(self, name: str, projection: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if self.now is not None:
            self.now.seen[name] = out

    def before_norm(self, i: int, norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        now = self.now
        if now is None:
            return None
        h = args[0]
        with now:
            map = self.method.reduce(self.view(now, i, h).require(self.method.info.needs))
            now.seen.clear()
            now.widths.append((h.shape[1], h.shape[1] if map is None else map.n_out))
            if map is None:
                return None
            if now.masked:
                raise ThriftError("reducing vision tokens does not work with an attention_mask: batch whole images")
            now.map = map
            return (map.apply(h),)

    def after_mlp(self, mlp: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        now = self.now
        if now is None or now.map is None:
            return None
        with now:
            return now.map.unmerge(out)

    def after_layer(self, layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        now = self.now
        if now is None or now.map is None:
            return None
        with now:
            now.maps.append(now.map)
            now.sizes = now.map.sizes(now.sizes)
            if getattr(self.method, "prop_attn", False):
                now.bias = now.sizes.log()[:, None, None, :]  # -inf at padding, whose size is 0
            elif not now.map.mask.all():
                now.bias = torch.where(now.sizes > 0, 0.0, -torch.inf)[:, None, None, :]
            return now.map.apply(out)

    # ---- what the method may look at --------------------------------------------------------------------------------

    def view(self, now: _Forward, i: int, h: Tensor) -> View:
        return View(
            features=h,
            keys=Lazy(partial(self.heads, now, i, "k_proj")),
            attention=Lazy(lambda: partial(self.attention, now, i)),
            sizes=Lazy(lambda: torch.ones(h.shape[:2], device=h.device) if now.sizes is None else now.sizes),
            # The prefix stays in front, so what is protected needs no tracking.
            protected=Lazy(lambda: (torch.arange(h.shape[1], device=h.device) < now.prefix).expand(h.shape[:2])),
            prefix=now.prefix,
            grid=now.grid,
            layer=i,
            layers=len(self.layers),
        )

    def heads(self, now: _Forward, i: int, projection: str) -> Tensor:
        """``(batch, heads, tokens, head_dim)``."""
        out = now.seen[projection]
        return out.view(*out.shape[:2], -1, self.attentions[i].head_dim).transpose(1, 2)

    def attention(self, now: _Forward, i: int, rows: Tensor | slice) -> Tensor:
        """Softmax attention of the query tokens ``rows``: ``(batch, heads, rows, tokens)``."""
        queries, keys = (self.heads(now, i, p) for p in ("q_proj", "k_proj"))
        scores = queries[:, :, rows] @ keys.transpose(-1, -2) * self.attentions[i].head_dim ** -0.5
        return torch.softmax(scores if now.bias is None else scores + now.bias, dim=-1)


PROJECTIONS = {"q_proj": {"attention"}, "k_proj": {"attention", "keys"}}
"""Projections whose output is kept until the layer's reduction, and the parts of the view that need it."""
