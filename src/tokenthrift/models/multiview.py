"""The adapter of multi-view transformers: many images of one scene, whose tokens all attend to each other.

Such a model (VGGT's aggregator is the pattern) has blocks of two kinds in turn: frame blocks, in which the tokens of
each view attend to each other, and global blocks, in which all views' do. The global ones grow with the square of the
number of views, so their attention is where a reduction pays.

The layout is found by its parts, not by the class: ``frame_blocks`` and ``global_blocks`` (each block has ``norm1``,
``attn`` with a fused ``qkv``, ``norm2``, ``mlp``), ``patch_size``, ``patch_start_idx`` (special tokens in front of each
view's patches), and images ``(batch, views, 3, height, width)``. Its attention must call
``torch.nn.functional.scaled_dot_product_attention``, which is where the reduction is put.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..core.costs import attention_flops, linear_flops
from ..core.errors import ThriftError
from ..core.session import Session
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.attention import per_head
from .attention import replace_attention
from .encoder import has

if TYPE_CHECKING:
    from .attention import Run

LAYOUT = ("frame_blocks", "global_blocks", "patch_start_idx", "patch_size")
BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp")
SHOWN = {"features", "prefix", "grid", "tokens", "layer", "layers"}


class MultiViewAdapter:
    """Models with the layout above, or that hold one, such as VGGT.

    Methods reduce the queries, keys and values of the global blocks (``on = ("kernel",)``, as ``fastvggt`` does), after
    rotation; the outputs are copied back, so frame blocks and heads see every token. ``view.features`` is the input of
    the attention, ``view.grid`` is (views, height, width), and the ``view.prefix`` special tokens stand in front of
    each view's patches. ``session.provenance()["vision"]`` holds the map of every global block that was reduced, by
    its number; the session's totals count the tokens that attend in the global blocks.
    """

    stages: tuple[str, ...] = ("vision",)

    def __init__(self, model: Any) -> None:
        found = find_aggregator(model)
        if found is None:
            raise ThriftError(f"{type(model).__name__} has no frame_blocks and global_blocks of transformer blocks")
        self.model = model
        self.aggregator = found

    @classmethod
    def fits(cls, model: Any) -> bool:
        """True for models that are, or hold, a multi-view aggregator."""
        return find_aggregator(model) is not None

    def install(self, stage: str, methods: list[Any], session: Session, undo: ExitStack) -> None:
        """See :class:`tokenthrift.core.session.Adapter`."""
        if len(methods) > 1:
            raise ThriftError(f"stage '{stage}' takes one method at a time here, the plan has {len(methods)}")
        method = methods[0]
        if getattr(method, "placement", "between") != "around" or tuple(method.on) != ("kernel",):
            raise ThriftError(
                f"multi-view models reduce queries, keys and values only, which {method.info.name} does not: "
                "write vision=fastvggt(...), or apply it to the model's image encoder alone"
            )
        if lacking := set(method.info.needs) - SHOWN:
            raise ThriftError(f"{method.info.name} reads {', '.join(sorted(lacking))}, which multi-view models lack")
        _Runtime(self.aggregator, method, session).attach(undo)


def find_aggregator(model: Any) -> Any | None:
    """The first module of ``model`` (which may be the model itself) with the layout of :data:`LAYOUT`."""
    modules: list[Any] = list(model.modules()) if isinstance(model, nn.Module) else []
    for module in modules:
        if not all(hasattr(module, name) for name in LAYOUT):
            continue
        blocks = [*module.frame_blocks, *module.global_blocks]
        if len(module.global_blocks) and all(has(block, path) for block in blocks for path in BLOCK):
            return module
    return None


class _Runtime:
    """The hooks of one session."""

    def __init__(self, aggregator: Any, method: Any, session: Session) -> None:
        self.aggregator, self.method, self.session = aggregator, method, session
        self.blocks = list(aggregator.global_blocks)
        self.signature = inspect.signature(aggregator.forward)
        self.grid = (0, 0, 0)
        """Of the last forward: gradient checkpointing may compute its blocks again afterwards."""
        self.batch = 0
        self.running = False
        self.maps: dict[int, TokenMap] = {}
        self.map: TokenMap | None = None
        """Of the attention that runs now, until it is used."""
        self.seconds = 0.0

    def attach(self, undo: ExitStack) -> None:
        def hook(register: Callable[..., Any], function: Callable[..., Any], **how: Any) -> None:
            undo.callback(register(function, **how).remove)

        hook(self.aggregator.register_forward_pre_hook, self.begin, with_kwargs=True)
        hook(self.aggregator.register_forward_hook, self.finish)
        for i, block in enumerate(self.blocks):
            hook(block.attn.register_forward_pre_hook, partial(self.before_attention, i), with_kwargs=True)
            hook(block.attn.register_forward_hook, self.after_attention)
        replace_attention([block.attn for block in self.blocks], lambda module: self.attend, undo)

    def begin(self, aggregator: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self.signature.bind_partial(*args, **kwargs).arguments.values()
        images = next((x for x in given if isinstance(x, Tensor) and x.dim() == 5), None)
        if images is None:
            raise ThriftError("a multi-view model takes images of the shape (batch, views, 3, height, width)")
        side = self.aggregator.patch_size
        high, wide = (side, side) if isinstance(side, int) else side
        self.batch, views, _, height, width = images.shape
        self.grid = (views, height // high, width // wide)
        self.running, self.maps, self.seconds = True, {}, 0.0

    def before_attention(self, i: int, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        started = time.perf_counter()
        view = View(
            features=x,
            prefix=int(self.aggregator.patch_start_idx),
            grid=self.grid,
            tokens=x.shape[1],
            layer=i,
            layers=len(self.blocks),
        )
        self.map = self.method.reduce(view.require(self.method.info.needs))
        self.seconds += time.perf_counter() - started
        if self.running and self.map is not None:
            self.maps[i] = self.map

    def attend(
        self, run: Run, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        map, self.map = self.map, None
        if map is None:
            return run(query, key, value, mask)
        if mask is not None:
            raise ThriftError("attention between views is reduced without a mask only: give views of equal size")
        query, key, value = (per_head(map.apply, x) for x in (query, key, value))
        return per_head(map.unmerge, run(query, key, value, None))

    def after_attention(self, attention: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if self.map is not None:
            self.map = None
            raise ThriftError(
                f"{type(attention).__name__} does not call torch's scaled_dot_product_attention, which is what can be "
                "reduced: set fused_attn=True on the attention modules"
            )

    def finish(self, aggregator: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """Tell the session what happened; a forward that failed does not come here."""
        self.running = False
        views, height, width = self.grid
        of_view = int(self.aggregator.patch_start_idx) + height * width
        n = views * of_view
        self.session.start_maps("vision")
        flops = dense = sum(views * _block_flops(block, of_view, of_view) for block in self.aggregator.frame_blocks)
        after = 0
        for i, block in enumerate(self.blocks):
            attending = n
            if i in self.maps:
                self.session.add_map("vision", self.maps[i], layer=i)
                attending = self.maps[i].n_out
            flops += _block_flops(block, n, attending)
            dense += _block_flops(block, n, n)
            after += attending
        before = self.batch * n * len(self.blocks)
        self.session.record("vision", before=before, after=self.batch * after, seconds=self.seconds)
        self.session.count_forward(self.batch * flops, self.batch * dense)
        self.maps = {}


def _block_flops(block: Any, tokens: int, attending: int) -> int:
    """Of one block, in whose attention only some of the tokens meet."""
    return linear_flops(block, tokens) + attention_flops(attending, attending, 1, block.attn.qkv.out_features // 3)
