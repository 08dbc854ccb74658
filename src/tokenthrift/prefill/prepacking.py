"""Prepacking: the padding of a batch of prompts is not computed."""

from __future__ import annotations

from typing import ClassVar

from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View


@method(
    "prepacking",
    stage="prefill",
    paper="Prepacking: A Simple Method for Fast Prefilling and Increased Throughput in Large Language Models",
    arxiv="2404.09529",
    needs=("mask",),
)
class Prepacking:
    """Prefill the prompts of a padded batch one behind the other, so that padding costs nothing.

    Exact: each prompt has its own positions and attends to itself alone, so logits and cache are those of the padded
    batch, up to rounding. Prompts share rows as in the authors' code (longest first, each into the emptiest row with
    room), but the row is the whole input of a forward, so it has no padding at its end either; and each prompt's last
    token is packed too, which the authors leave to the first decoding step. Batches without padding, with padding on
    the right, and calls that want more than logits and a cache run as they are.

    ``tt.pack`` does the same for a list of prompts.

    Args:
        row: tokens that go through the model at once, unless a prompt is longer: what bounds the memory.

    Raises:
        ThriftError: a row without tokens; a model whose attention is neither full nor sliding; a plan with a cache
            stage, which would have nothing to look at.
    """

    row: int = 2048

    place: ClassVar[str] = "rows"

    def __post_init__(self) -> None:
        if self.row < 1:
            raise ThriftError(
                f"prepacking row={self.row} holds no token: give the tokens that may go through the model at once"
            )

    def reduce(self, view: View) -> TokenMap:
        return TokenMap.keep(view.mask)
