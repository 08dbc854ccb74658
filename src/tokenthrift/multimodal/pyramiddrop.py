"""PyramidDrop: at the end of each stage of the language model, part of the visual tokens goes."""

from __future__ import annotations

from typing import Any, ClassVar

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.visual import keep_looked_at


@method(
    "pyramiddrop",
    stage="prefill",
    paper="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
    arxiv="2410.17247",
    needs=("attention", "visual", "visual_lengths", "mask"),
    status="partial",
)
class PyramidDrop:
    """After a quarter, half and three quarters of the layers, keep half of the visual tokens that are left.

    Those stay that the last token of the prompt, the end of the instruction, looks at most, mean over heads. What goes
    is neither computed nor stored by the layers above. Text stays; prompts without visual tokens run as they are.

    Partial: the stages, the shares and the query are the authors'. Their code ranks by the queries and keys of the
    layer that comes next, which it computes for that; here they are those of the layer that has just run, and cost
    nothing. Theirs numbers the tokens that are left anew; here they keep their true positions. Shares are rounded to
    the nearest number of tokens, theirs downwards. The training that their paper also proposes is not here.

    Args:
        keep: share of the visual tokens that each stage leaves to the next one, in (0, 1].
        layers: how many layers have run where tokens go, ascending; None: a quarter, half and three quarters of them.

    Raises:
        ThriftError: a ``keep`` outside (0, 1], layers that are none or not there; a model that reads text only, or has
            sliding windows; a plan with a cache, attention or decode stage.
    """

    keep: float = 0.5
    layers: Any = None

    place: ClassVar[str] = "cascade"

    def __post_init__(self) -> None:
        Budget(ratio=self.keep)
        ends = self.layers
        if ends is not None:
            if not isinstance(ends, list | tuple) or not ends or not all(type(i) is int and i > 0 for i in ends):
                raise ThriftError(f"pyramiddrop layers={ends!r} must be numbers of layers: write layers=[8, 16, 24]")
            if sorted(set(ends)) != list(ends):
                raise ThriftError(f"pyramiddrop layers={ends!r} must ascend: write layers={sorted(set(ends))}")
            object.__setattr__(self, "layers", tuple(ends))

    def token_shares(self, layers: int) -> dict[int, float]:
        """After which layers visual tokens go, and the share of the prompt's that is then left."""
        if self.layers is not None and self.layers[-1] >= layers:
            raise ThriftError(
                f"pyramiddrop layers={list(self.layers)}: the model has {layers} layers; name numbers below that"
            )
        ends = self.layers or sorted({layers * i // 4 for i in (1, 2, 3)} - {0})
        return {end - 1: self.keep ** (i + 1) for i, end in enumerate(ends)} if self.keep < 1 else {}

    def reduce(self, view: View) -> TokenMap:
        return keep_looked_at(view, self.token_shares(view.layers)[view.layer])
