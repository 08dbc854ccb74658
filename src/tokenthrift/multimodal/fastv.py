"""FastV: after the second layer, half of the visual tokens are not worth computing."""

from __future__ import annotations

from typing import ClassVar

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.visual import keep_looked_at


@method(
    "fastv",
    stage="prefill",
    paper="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
    "Vision-Language Models",
    arxiv="2403.06764",
    needs=("attention", "visual", "visual_lengths", "mask"),
)
class FastV:
    """After the first layers of the language model, drop the visual tokens that the prompt's last token looks at least.

    Attention is that of the last of these layers, mean over heads, of one row of queries. What goes is neither computed
    nor stored by the layers above; those before hold everything. All tokens keep their true positions, and text stays.
    All visual tokens of a prompt are one set. Prompts without visual tokens run as they are.

    Args:
        keep: visual tokens that are left of each prompt: a share in (0, 1], or a count.
        layer: how many layers compute all tokens, at least 1.

    Raises:
        ThriftError: a ``keep`` outside (0, 1] or below 1, no layer, or no fewer than the model has; a model that reads
            text only, or has sliding windows; a plan with a cache, attention or decode stage.
    """

    keep: int | float = 0.5
    layer: int = 2

    place: ClassVar[str] = "cascade"

    def __post_init__(self) -> None:
        Budget.of(self.keep)
        if self.layer < 1:
            raise ThriftError(
                f"fastv layer={self.layer}: some layer must see all tokens; write layer=2 or another number"
            )

    def token_shares(self, layers: int) -> dict[int, int | float]:
        """After which layer visual tokens go, and what is then left of them."""
        if self.layer >= layers:
            raise ThriftError(f"fastv layer={self.layer}: the model has {layers} layers; write a number below that")
        return {self.layer - 1: self.keep} if self.keep != 1.0 else {}

    def reduce(self, view: View) -> TokenMap:
        return keep_looked_at(view, self.keep)
