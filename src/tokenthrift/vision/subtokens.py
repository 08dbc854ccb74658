"""Sub-token merging: the pieces into which a tokenizer cuts a name become one token again, inside the encoder."""

from __future__ import annotations

from typing import ClassVar

from ..core.errors import ThriftError, did_you_mean
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.segments import segment_starts

MODES = ("mean", "attention")


@method(
    "subtokens",
    stage="vision",
    paper="On the Effect of Token Merging on Pre-trained Models for Code",
    arxiv="2507.14423",
    needs=("features", "segments", "protected", "attention"),
    status="partial",
)
class Subtokens:
    """Merge the hidden states of the sub-tokens of one identifier, for text encoders of code (CodeBERT).

    What belongs together is in the view's ``segments``, which the runtime reads off the tokenizer's pieces
    (``models/segments.py``); pass the tokenizer as ``processor`` to ``apply``. Special tokens stay alone. Sequences of
    a batch may be left with different numbers of tokens.

    Partial: only the paper's abstract is known. It has a plain mean and a learned one, "seamlessly" in the model, after
    fine-tuning. Where in the model is ours (``at``), and so is ``mode="attention"``: it stands for the learned weights,
    which need training, by the attention that a token receives, averaged over heads and queries.

    Parameters:
        at: the layer in front of which to merge; 0 merges the embeddings, ``n`` what layer ``n - 1`` returns.
        mode: ``mean``, or ``attention`` for a mean weighted by the attention received in layer ``at``.
        prop_attn: proportional attention: a merged token counts as often as it has pieces. The abstract does not speak
            of it.

    Raises:
        ThriftError: a negative layer or an unknown mode.
    """

    placement: ClassVar[str] = "boundary"

    at: int = 0
    mode: str = "mean"
    prop_attn: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.at, bool) or not isinstance(self.at, int) or self.at < 0:
            raise ThriftError(f"subtokens at={self.at!r} is no layer: write at=0 for the embeddings, or at=3")
        if self.mode not in MODES:
            raise ThriftError(f"unknown mode '{self.mode}' of subtokens: {did_you_mean(str(self.mode), MODES)}")

    def reduce(self, view: View) -> TokenMap | None:
        """The merge in front of layer ``at``; None everywhere else, and where no name has several pieces."""
        if view.layer != self.at:
            return None
        starts = segment_starts(view.segments, alone=view.protected)
        if starts.all():
            return None
        weight = view.attention(slice(None)).mean((1, 2)) if self.mode == "attention" else None
        slot = starts.cumsum(-1) - 1
        n_out = int(slot[:, -1].max()) + 1
        # A merged token stands where its name begins.
        anchor = (~starts).byte().argsort(dim=-1, stable=True)[:, :n_out]
        return TokenMap.merge(slot, n_out, weight=weight, anchor=anchor)
