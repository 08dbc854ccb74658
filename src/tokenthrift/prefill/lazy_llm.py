"""LazyLLM: upper layers compute the tokens that the next token needs, and others when a later one needs them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.topk import keep_top
from .layers import ascending


@method(
    "lazy_llm",
    stage="prefill",
    paper="LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference",
    arxiv="2407.14057",
    needs=("attention", "mask", "protected"),
    status="partial",
)
class LazyLLM:
    """After some layers, go on with the prompt tokens that the last token attends to most, anew for every token.

    The attention of the last token, averaged over the heads of such a layer, ranks the tokens that are there; the
    layers above compute and attend to the best of them alone. What was left behind waits as hidden states in an
    auxiliary cache: when a later token ranks it among the best, the layers above compute it from there, so none
    computes a token twice. All tokens keep their true positions.

    Partial: there is no code by the authors, and the paper leaves open at which layers how many tokens go. Assumed:
    each of the layers keeps the same share of what it gets; tokens after the prompt always stay; of a later forward
    with several tokens the last one ranks. Logits of prompt tokens that were left behind are read off where they
    stopped.

    Args:
        keep: share of the prompt's tokens that is left after the last of the layers, in (0, 1].
        layers: after which tokens are left behind, counted from 0, ascending; None = at a quarter, half and three
            quarters of the depth.

    Raises:
        ThriftError: a share outside (0, 1], layers that are none or not there, a model with sliding windows; a plan
            with a cache or decode stage.
    """

    keep: float = 0.3
    layers: Any = None

    place: ClassVar[str] = "layers"

    def __post_init__(self) -> None:
        Budget(ratio=self.keep)
        if self.layers is not None:
            object.__setattr__(self, "layers", ascending("lazy_llm", self.layers, "(8, 16)"))

    def ends(self, layers: int) -> list[int]:
        """The layers after which tokens are left behind, in a model of ``layers`` layers; never the last."""
        ends = sorted({layers * part // 4 for part in (1, 2, 3)}) if self.layers is None else list(self.layers)
        if ends[-1] >= layers - 1 and self.layers is not None:
            raise ThriftError(f"lazy_llm layers={self.layers}: name some of 0 to {layers - 2}, below the last layer")
        return [end for end in ends if end < layers - 1]

    def reduce(self, view: View) -> TokenMap:
        share = Budget(ratio=self.keep ** (1 / len(self.ends(view.layers))))
        score = view.attention(1)[:, :, 0].mean(1).masked_fill(view.protected, torch.inf)
        counts = torch.maximum(share.tokens_of(view.mask.sum(1)), (view.protected & view.mask).sum(1))
        return TokenMap.keep(keep_top(score.unsqueeze(1), counts, view.mask).kept.squeeze(1))
