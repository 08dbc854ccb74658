"""VTC-CLS: keep the visual tokens that CLS attends to, over several layers of the encoder."""

from __future__ import annotations

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.topk import top_mask
from ..ops.visual import keep_all, keep_chosen, to_keep
from .parameters import check_positions, encoder_layer


@method(
    "vtc_cls",
    stage="connector",
    paper="[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs",
    arxiv="2412.05819",
    needs=("cls", "layers", "mask", "protected"),
)
class VTCCLS:
    """Keep the visual tokens with the most attention from CLS, summed over the encoder's later layers.

    Attention is averaged over the heads; the last layer never counts. The authors choose the first layer anew for each
    benchmark and name no default. An image is one set of tokens with all its crops; the authors have images without.

    Args:
        keep: tokens to keep of each image: a share in (0, 1], or a count.
        start: first layer that counts, from 0, or negative from the end; None, our default: the last quarter of the
            layers, the last one left out (18 to 22 of 24).
        positions: in the language model: "gapless" as in the authors' code, or "original".

    Raises:
        ThriftError: a ``keep`` outside (0, 1] or below 1, a ``start`` behind the last layer but one,
            unknown positions; an encoder without CLS, for which there are
            ``hiprune`` and ``divprune``.
    """

    keep: int | float = 0.111
    start: int | None = None
    positions: str = "gapless"

    def __post_init__(self) -> None:
        Budget.of(self.keep)
        check_positions("vtc_cls", self.positions)

    def encoder_layers(self, count: int) -> list[int]:
        """The layers whose attention is summed, of an encoder with ``count``."""
        first = count - max(count // 4, 2) if self.start is None else self.start
        layers = list(range(encoder_layer("vtc_cls", "start", first, count), count - 1))
        if not layers:
            raise ThriftError(f"vtc_cls start={self.start}: the last of {count} layers never counts; write an earlier")
        return layers

    def reduce(self, view: View) -> TokenMap:
        wanted = to_keep(view, self.keep)
        if wanted is None:
            return keep_all(view)
        free, counts = wanted
        score = sum(view.cls(layer).mean(1) for layer in self.encoder_layers(view.layers))
        return keep_chosen(view, top_mask(score, counts, free))
