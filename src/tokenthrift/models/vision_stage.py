"""The vision stage: reduces tokens in the layers of an encoder, by hooks alone.

Where a method acts is its ``placement``:

``between`` attention and MLP (the default). A pre-norm layer computes ``h = x + attention(x)`` and returns ``h +
mlp(h)``. Hooks cannot shorten the residual ``h``, but with a reduction ``M`` and a lift ``U`` for which ``M U = I``
they need not: ``M (h + U mlp(M h)) = M h + mlp(M h)`` is the layer with its tokens reduced between attention and MLP.
So the second norm gets ``M h``, the output of the MLP is lifted with ``U``, and the layer's output is reduced with
``M``. The identity holds for pruning and merging, with any LayerScale after the MLP; the MLP runs on the few tokens
only. In post-norm layers ``h`` is the output of a norm, and it is enough to shorten that.

``boundary``: the input of a layer is reduced. Any map will do. Before it, ``join`` may make sequences of several rows
(frames). With ``fused_attention`` the layer takes ``W A P^T`` of the attention ``A`` before the reduction as its own.

``around``: the input of a sub-layer (``on``: attention, mlp, or kernel: the queries, keys and values) is reduced and
its output unmerged, so that the length of the stream stays.

A method has ``reduce(view) -> TokenMap | None``: None leaves the layer as it is, and then nothing is computed for it.
Protected tokens of the prefix must come out first, in their order. ``combine(view, map)`` may make the merged features
itself. A method whose ``prop_attn`` is true gets proportional attention: ``log(size)`` is added to the attention
scores, so a token counts as often as it has sources; kernels that take no such mask get it as one more channel of the
keys.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..core.costs import attention_flops, linear_flops
from ..core.errors import ThriftError
from ..core.session import Session
from ..core.tokenmap import TokenMap
from ..ops.attention import attend_fused, augment_keys, per_head
from .attention import BASES, replace_attention
from .encoder import part
from .encoder_forward import Forward, Parts, attention_bias
from .segments import IdentifierSegments

if TYPE_CHECKING:
    from .attention import Attend, Run
    from .encoder import EncoderAdapter

PLACEMENTS = ("between", "boundary", "around")
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Kernels that take no additive mask."""
_reduced: WeakSet[nn.Module] = WeakSet()
"""Encoders on which a session is installed."""


def install_vision(adapter: EncoderAdapter, method: Any, session: Session, undo: ExitStack) -> None:
    """Reduce the encoder's tokens with ``method`` until ``undo`` closes.

    Raises:
        ThriftError: the method does not fit the encoder or its attention implementation.
    """
    _Runtime(adapter, method, session).attach(undo)


class _Runtime:
    """The hooks of one session. All state of a forward is in ``self.now``, which each thread has for itself."""

    def __init__(self, adapter: EncoderAdapter, method: Any, session: Session) -> None:
        self.parts = Parts(adapter.encoder, adapter.family, adapter.layers)
        self.encoder, self.family, self.layers = adapter.encoder, adapter.family, adapter.layers
        self.method, self.session = method, session
        self.name = method.info.name
        self.placement = getattr(method, "placement", "between")
        if self.placement not in PLACEMENTS:
            raise ThriftError(f"{self.name} has the placement {self.placement!r}; there are {', '.join(PLACEMENTS)}")
        self.on = set(getattr(method, "on", ())) if self.placement == "around" else set()
        if self.on - {"attention", "mlp", "kernel"} or (self.placement == "around" and not self.on):
            raise ThriftError(f"{self.name} on={sorted(self.on)}: name some of 'attention', 'mlp' and 'kernel'")
        if getattr(method, "images_only", False) and self.family.text:
            raise ThriftError(f"{self.name} works on grids of patches; {type(self.encoder).__name__} reads text")
        if "segments" in method.info.needs and not self.family.text:
            raise ThriftError(f"{self.name} works on the words of a text; {type(self.encoder).__name__} reads images")
        if "mlp" in self.on and self.family.post_norm:
            raise ThriftError(f"{type(self.encoder).__name__} has no MLP module to merge around: leave out on='mlp'")
        self.prop_attn = bool(getattr(method, "prop_attn", False)) and self.placement != "around"
        self.inside = adapter.encoder is not adapter.model
        self._running, self._writing = threading.local(), threading.Lock()
        self.identifiers: IdentifierSegments | None = None
        attention_parts = [part(layer, self.family.attention.split(".")[0]) for layer in self.layers]
        of_attention = [linear_flops(a) for a in attention_parts]
        self.costs = [(a, linear_flops(layer) - a) for a, layer in zip(of_attention, self.layers, strict=True)]
        needs = set(method.info.needs)
        self.wanted = {
            path
            for path, parts in ((self.family.query, {"attention"}), (self.family.key, {"attention", "keys"}))
            if needs & parts
        }
        config = getattr(adapter.encoder, "config", None)
        self.kernel = getattr(config, "_attn_implementation", "sdpa")
        if self.kernel not in BASES and (self.prop_attn and self.kernel not in FLASH):
            raise ThriftError(
                f"proportional attention needs sdpa, eager or flash attention, the model uses {self.kernel}: "
                "call model.set_attn_implementation('sdpa'), or set prop_attn=False"
            )
        self.signature = inspect.signature(self.encoder.forward)

    @property
    def now(self) -> Forward | None:
        """The forward that runs in this thread."""
        now: Forward | None = getattr(self._running, "now", None)
        return now

    @now.setter
    def now(self, now: Forward | None) -> None:
        self._running.now = now

    def __reduce__(self) -> NoReturn:
        """A copy would be reduced for ever: its hooks belong to no session that could remove them."""
        raise ThriftError(
            f"{type(self.encoder).__name__} cannot be copied or pickled while a session is installed on it: "
            "leave its with block first, or save model.state_dict()"
        )

    def attach(self, undo: ExitStack) -> None:
        if self.encoder in _reduced:
            raise ThriftError("another session is installed on this model; leave its with block first")
        undo.callback(_reduced.discard, self.encoder)
        _reduced.add(self.encoder)

        def hook(register: Callable[..., Any], function: Callable[..., Any], **how: Any) -> None:
            undo.callback(register(function, **how).remove)

        family = self.family
        hook(self.encoder.register_forward_pre_hook, self.begin, with_kwargs=True)
        hook(self.encoder.register_forward_hook, self.finish, always_call=True)  # after an exception, to forget
        if self.parts.patches is not None:
            hook(self.parts.patches.register_forward_hook, self.see_grid)
        for path in (family.pool, family.restore):
            module = getattr(self.encoder, path, None) if path else None
            if module is not None:
                hook(module.register_forward_pre_hook, self.restore)
        unlike = {id(layer): layer for layer in self.layers}.values()  # a layer may be there several times
        for layer in unlike:
            norm, mlp = part(layer, family.norm), None if family.post_norm else part(layer, family.mlp)
            hook(layer.register_forward_pre_hook, self.before_layer, with_kwargs=True)
            if self.placement == "between":
                for path in self.wanted:
                    hook(part(layer, path).register_forward_hook, partial(self.see_projection, path))
                if mlp is None:
                    hook(norm.register_forward_hook, self.after_norm)
                else:
                    hook(norm.register_forward_pre_hook, self.before_norm)
                    hook(mlp.register_forward_hook, self.after_mlp)
            if "attention" in self.on:
                hook(part(layer, family.attention).register_forward_pre_hook, self.merge_input, with_kwargs=True)
                hook(part(layer, family.attention).register_forward_hook, self.unmerge_output)
            if mlp is not None and "mlp" in self.on:
                hook(mlp.register_forward_pre_hook, self.merge_input, with_kwargs=True)
                hook(mlp.register_forward_hook, self.unmerge_output)
            # In front, so that the hooks by which transformers collects hidden states see the reduced ones.
            hook(layer.register_forward_hook, self.after_layer, prepend=True)
            hook(layer.register_forward_hook, self.end_replay, always_call=True)
            # Gradient checkpointing may compute the inside of a layer again, without the layer's own hooks.
            hook(part(layer, family.first_norm or family.attention).register_forward_pre_hook, self.begin_inside)
            hook((mlp or norm).register_forward_hook, self.end_replay_inside, always_call=True)
        attend = self.attend()
        if attend is not None:
            replace_attention(self.parts.attentions, lambda module: attend, undo, (*BASES, *FLASH))
        undo.callback(setattr, self, "_running", threading.local())

    # ---- around the encoder -----------------------------------------------------------------------------------------

    def begin(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.now = now = Forward(self.parts, self.prop_attn)
        given = self.signature.bind_partial(*args, **kwargs).arguments
        mask = given.get("attention_mask", given.get("kwargs", {}).get("attention_mask"))
        if isinstance(mask, Tensor):
            if mask.dim() != 2:
                raise ThriftError(
                    f"an attention_mask of {mask.dim()} dimensions cannot be reduced: give (batch, tokens)"
                )
            now.given = mask.bool()
            now.real = None if bool(now.given.all()) else now.given
        if "segments" in self.method.info.needs:
            now.segments = self.segments(given.get("input_ids"))
        if self.parts.patches is not None:
            self.check_size(given)

    def check_size(self, given: dict[str, Any]) -> None:
        side = self.parts.patches.kernel_size
        image = next((x for x in given.values() if isinstance(x, Tensor) and x.dim() == 4), None)
        if image is not None and (image.shape[-2] < side[0] or image.shape[-1] < side[1]):
            h, w = image.shape[-2:]
            raise ThriftError(
                f"an image of {h} x {w} pixels is smaller than a patch ({side[0]} x {side[1]}): enlarge it"
            )

    def segments(self, ids: Any) -> Tensor:
        """The groups of tokens that belong together, from the tokenizer: ``(batch, tokens)``."""
        tokenizer = getattr(self.session.processor, "tokenizer", self.session.processor)
        if tokenizer is None or ids is None:
            raise ThriftError(
                f"{self.name} needs input_ids and their tokenizer: write apply(plan, model, processor=tokenizer)"
            )
        if self.identifiers is None:
            self.identifiers = IdentifierSegments.of(tokenizer)
        return self.identifiers(ids)

    def see_grid(self, patches: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if self.idle or (self.now is not None and self.now.partial):  # timm's forward_features, without forward
            self.now = Forward(self.parts, self.prop_attn, partial=True)
        if self.now is not None:
            self.now.grid = (1, out.shape[-2], out.shape[-1])

    def restore(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        now = self.now
        if now is None or now.replay:
            return None
        if now.partial and now.widths:
            self.write(now)
            self.now = None
        if not (now.maps or now.frames > 1):
            return None
        return self.dense(now, args[0]), *args[1:]

    def dense(self, now: Forward, tokens: Tensor) -> Tensor:
        """Copied back to all positions, each frame in its own row."""
        if now.maps:
            tokens = now.composed.unmerge(tokens)
        return tokens.reshape(now.batch * now.frames, -1, tokens.shape[-1])

    def finish(self, encoder: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        now, self.now = self.now, None
        if now is None or out is None or not now.widths:
            return None
        self.write(now)
        already = self.family.restore is not None
        if already or not now.maps or not (self.inside or self.family.text):
            return None
        if isinstance(out, tuple):
            return self.dense(now, out[0]), *out[1:]
        out.last_hidden_state = self.dense(now, out.last_hidden_state)
        return out

    def write(self, now: Forward) -> None:
        """Tell the session what happened."""
        device = next(self.encoder.parameters()).device
        with self._writing:  # one forward after the other
            self.session.start_maps("vision")
            before = now.batch * now.tokens if now.given is None else int(now.given.sum())
            left = before if not now.maps else int(now.maps[-1].mask.sum())
            if now.around:  # each layer's own, as they are in a cache; the stream keeps its length
                for layer, map in now.around.items():
                    self.session.add_map("vision", map, layer)
                left = sum(int(map.mask.sum()) for map in now.around.values())
                left += before * (len(now.widths) - len(now.around))
                before *= len(now.widths)
            else:
                for map in now.maps or [TokenMap.identity(now.tokens, (now.batch,), device)]:
                    self.session.add_map("vision", map)
            self.session.record("vision", before=before, after=left, seconds=now.seconds)
            dense = [(now.tokens // now.frames,) * 3] * len(now.widths)
            self.session.count_forward(self.flops(now, now.widths), self.flops(now, dense, now.frames))

    def flops(self, now: Forward, widths: list[tuple[int, int, int]], frames: int = 1) -> int:
        """Of the patch embedding and the layers; see :attr:`Forward.widths`. A joined row was ``frames`` rows."""
        total = 0
        for (of_attention, of_mlp), (projected, attending, mlp) in zip(self.costs, widths, strict=True):
            total += projected * of_attention + mlp * of_mlp
            total += attention_flops(attending, attending, self.parts.heads, self.parts.head_dim)
        queries_keys = (
            2 * 2 * self.parts.heads * self.parts.head_dim * part(self.layers[0], self.family.key).in_features
        )
        for n in now.ahead if widths is now.widths else ():  # queries and keys once more, and their products
            total += n * queries_keys + attention_flops(n, n, self.parts.heads, self.parts.head_dim) // 2
        patches = self.parts.patches
        embedded = 0 if patches is None else 2 * patches.weight.numel() * now.grid[1] * now.grid[2] * now.frames
        return now.batch * (total * frames + embedded)

    # ---- around a layer ---------------------------------------------------------------------------------------------

    def before_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        h = args[0] if args else kwargs["hidden_states"]
        if hasattr(h, "_tokenthrift_layer") and self.idle:  # gradient checkpointing computes this layer again
            self.now = h._tokenthrift_layer.snapshot("layer")
        now = self.now
        if now is None:
            return None
        if now.layer < 0 and not now.tokens:
            now.start(h)
        if torch.is_grad_enabled():
            h._tokenthrift_layer = now.snapshot("")
        now.layer += 1
        now.map = now.excess = now.whole = now.before = None
        now.attended = False
        x = h
        if self.placement != "between":
            with now:
                x = self.at_boundary(now, h)
        n, attending = x.shape[1], h.shape[1] if now.before else x.shape[1]
        now.widths.append((n, attending if now.map is None else now.map.n_out, n))
        if torch.is_grad_enabled():
            x._tokenthrift_inside = now.snapshot("")
        bias = self.layer_bias(now, x.dtype)
        if bias is None and not now.maps and x is h:
            return None
        return self.with_input(args, kwargs, x, bias)

    def at_boundary(self, now: Forward, h: Tensor) -> Tensor:
        frames = self.method.join(now.layer) if hasattr(self.method, "join") else 1
        if frames > 1:
            if now.maps or h.shape[0] % frames:
                raise ThriftError(
                    f"{self.name} joins {frames} frames before layer {now.layer}: the batch of {h.shape[0]} must be a "
                    "multiple of it, and nothing may be reduced before"
                )
            h = now.join(h, frames)
        project = _lazily(lambda: self.parts.project(now.layer, h))
        decided = now.decide(self.method, h, project)
        if decided is None:
            return h
        map, combined = decided
        if self.placement == "around":
            now.map = now.around[now.layer] = map
            return h
        if getattr(self.method, "fused_attention", False):
            now.before = now.attention_ahead(project)
            now.ahead.append(h.shape[1])
        now.commit(map)
        return map.apply(h) if combined is None else combined

    def layer_bias(self, now: Forward, dtype: torch.dtype) -> Tensor | None:
        if now.bias is None or (self.kernel in FLASH and now.real is None and now.last is None):
            return None
        if self.kernel in FLASH:
            raise ThriftError(
                f"{self.kernel} takes no mask for reduced tokens of different numbers: "
                "call model.set_attn_implementation('sdpa')"
            )
        return now.bias.to(dtype)

    def with_input(self, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, mask: Tensor | None) -> Any:
        if not args:
            kwargs = {**kwargs, "hidden_states": x}
        else:
            args = (x, *args[1:])
        # Where no mask is needed, the model's own must go as well: it is as long as the tokens were at the start.
        if len(args) > 1:
            return (x, mask, *args[2:]), kwargs
        if mask is None and self.family.mask not in kwargs:
            return args, kwargs
        return args, {**kwargs, self.family.mask: mask}

    def see_projection(self, path: str, projection: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if self.now is not None:
            self.now.seen[path] = out

    def before_norm(self, norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        reduced = self.between(args[0])
        return None if reduced is None else (reduced,)

    def after_norm(self, norm: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        reduced = self.between(out)
        if reduced is not None and self.now is not None and self.now.map is not None:
            self.now.commit(self.now.map)
        return reduced

    def between(self, h: Tensor) -> Tensor | None:
        now = self.now
        if now is None:
            return None
        with now:
            decided = now.decide(self.method, h, lambda: now.seen)
            now.seen.clear()
            if decided is None:
                return None
            now.map, combined = decided
            now.widths[-1] = (h.shape[1], h.shape[1], now.map.n_out)
            reduced = now.map.apply(h)
            if combined is None:
                return reduced
            now.excess = combined - reduced
            return combined

    def after_mlp(self, mlp: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        now = self.now
        if now is None or now.map is None:
            return None
        with now:
            return now.map.unmerge(out)

    def after_layer(self, layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        now = self.now
        if now is None:
            return None
        due = now.before is not None or ("kernel" in self.on and now.map is not None)
        if due and not now.attended:
            raise ThriftError(
                f"{self.name} replaces the attention of {type(self.encoder).__name__}, which does not call "
                "scaled_dot_product_attention: switch fused attention on (timm.layers.set_fused_attn) and make the "
                "model again, or take a method that leaves attention alone, such as tome"
            )
        if now.map is None or self.placement != "between" or self.family.post_norm:
            return None
        with now:
            now.commit(now.map)
            reduced = now.map.apply(out)
            return reduced if now.excess is None else reduced + now.excess

    # ---- gradient checkpointing: a layer, or its inside, computed once more -----------------------------------------

    @property
    def idle(self) -> bool:
        """No forward runs, as far as is known: the inside of a layer, computed again, may end without a word."""
        return self.now is None or self.now.replay == "inside"

    def begin_inside(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and hasattr(args[0], "_tokenthrift_inside") and self.idle:
            self.now = args[0]._tokenthrift_inside.snapshot("inside")

    def end_replay(self, layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if self.now is not None and self.now.replay:
            self.now = None

    def end_replay_inside(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if self.now is not None and self.now.replay == "inside":
            self.now = None

    # ---- around a sub-layer -----------------------------------------------------------------------------------------

    def merge_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self.now
        if now is None or now.map is None:
            return None
        x = args[0] if args else kwargs["hidden_states"]
        with now:
            real = now.map.mask if now.map.padded else None
            last = None if now.last is None else -now.map.positions("first", -now.last)
            bias = attention_bias(None, real, last)
            mask = None if bias is None else bias.to(x.dtype)
            args, kwargs = self.with_input(args, kwargs, now.map.apply(x), mask)
            if "attention" in self.on:
                attending = now.widths[-1][1]
                now.widths[-1] = (attending, attending, attending if "mlp" in self.on else now.widths[-1][2])
            return args, kwargs

    def unmerge_output(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        now = self.now
        if now is None or now.map is None:
            return None
        with now:
            return (now.map.unmerge(out[0]), *out[1:]) if isinstance(out, tuple) else now.map.unmerge(out)

    def attend(self) -> Attend | None:
        """What stands in for the layers' attention, if anything has to."""
        if "kernel" in self.on:
            return self.attend_merged
        if getattr(self.method, "fused_attention", False):
            return self.attend_fused
        return self.attend_augmented if self.prop_attn and self.kernel in FLASH else None

    def attend_merged(
        self, run: Run, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        now = self.now
        if now is None or now.map is None:
            return run(query, key, value, mask)
        now.attended = True
        map = now.map
        q, k, v = (per_head(map.apply, x) for x in (query, key, value))
        real = map.mask if map.padded else None
        last = None if now.last is None else -map.positions("first", -now.last)
        bias = attention_bias(None, real, last)
        return per_head(map.unmerge, run(q, k, v, None if bias is None else bias.to(query.dtype)))

    def attend_fused(
        self, run: Run, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        now = self.now
        if now is None or now.before is None:
            return run(query, key, value, mask)
        queries, keys, bias = now.before
        if queries.shape[1] != query.shape[1]:
            raise ThriftError(
                f"{self.name} has attention of {queries.shape[1]} heads, {type(self.encoder).__name__} asks for "
                f"{query.shape[1]} (differential attention?): take a method that leaves attention alone, such as tome"
            )
        now.attended = True
        return attend_fused(queries, keys, value, now.maps[-1], scaling, bias, now.whole)

    def attend_augmented(
        self, run: Run, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        if self.now is None or self.now.bias is None or self.now.sizes is None:
            return run(query, key, value, mask)
        dim = value.shape[-1]
        query, key = augment_keys(query, key, self.now.sizes, scaling, multiple=8)
        value = torch.nn.functional.pad(value, (0, query.shape[-1] - dim))  # these kernels want equal widths
        return run(query, key, value, mask)[..., :dim]


def _lazily(make: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    made: list[dict[str, Tensor]] = []

    def get() -> dict[str, Tensor]:
        if not made:
            made.append(make())
        return made[0]

    return get
