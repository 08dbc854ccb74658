"""LayerSkip's self-speculation: draft with the model's first layers, verify with all of them."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.errors import ThriftError
from ..core.method import method
from .early_exit import ExitDrafters, depth_of
from .protocols import Request


@method(
    "layer_skip",
    stage="decode",
    paper="LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding",
    arxiv="2404.16710",
)
class LayerSkip:
    """Draft with the model's own first layers, the final norm and the head; verify with the whole model.

    Drafts are those of transformers' ``assistant_early_exit``, and worth their time on models that were trained for
    early exit. Others give drafts that are hardly ever right, which ``adaptive`` notices, and stops drafting.

    Args:
        exit: layers that draft: a count, or a share of the model's layers in (0, 1).
        draft: guesses in a draft at most.
        adaptive: draft as many tokens as pay by the share of right guesses of late and what a guess costs in layers,
            the head included, which may be none. That share is also measured while nothing is drafted, on the tokens
            that the model writes anyway. False always drafts ``draft`` tokens.

    Drafts are written into the target's own cache, behind what is committed. The verifying forward runs all layers
    over them again, where LayerSkip goes on from the exit: the same number of layers is loaded either way.

    Raises:
        ThriftError: a parameter outside its range; when generating, an exit that the model does not have, a model whose
            layers are not found, or a cache that cannot be packed.
    """

    exit: int | float = 0.25
    draft: int = 6
    adaptive: bool = True

    def __post_init__(self) -> None:
        if self.exit <= 0 or (isinstance(self.exit, float) and self.exit >= 1):
            raise ThriftError(
                f"layer_skip needs exit as a count of layers or a share below 1, for instance 0.25, not {self.exit!r}"
            )
        if self.draft < 1:
            raise ThriftError("layer_skip needs draft of at least 1")

    def start_batch(self, prompts: Sequence[Sequence[int]], request: Request) -> ExitDrafters:
        """The drafters of a batch."""
        layers = len(depth_of(request.model).layers)
        exit = self.exit if isinstance(self.exit, int) else max(round(self.exit * layers), 1)
        if exit >= layers:
            raise ThriftError(f"layer_skip(exit={exit}): the model has {layers} layers, choose an exit below that")
        return ExitDrafters(request, [exit], self.draft, self.adaptive, decay=0.95, watch=False)
