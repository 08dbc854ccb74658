"""FlashVLM: keep the visual tokens that CLS and the prompt agree on, and some of the others that differ."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.visual import keep_all, keep_chosen, to_keep
from .parameters import check_positions, check_share, encoder_layer

WORDS = 0.05
"""Temperature of the softmax by which a visual token weighs the words of the prompt."""
TOKENS, POWER = 0.01, 2.5
"""Temperature of the softmax over visual tokens, and the power that sharpens it further."""
BRIGHT, DIM = 0.005, 0.1
"""The share of the tokens whose relevance counts in full, and the factor of the others'."""
EPS = 1e-6


@method(
    "flashvlm",
    stage="connector",
    paper="FlashVLM: Text-Guided Visual Token Selection for Large Multimodal Models",
    arxiv="2512.20561",
    needs=("features", "hidden", "cls", "text", "text_mask", "mask", "protected"),
)
class FlashVLM:
    """Keep tokens that both CLS and the prompt's text find important, and a diverse sample of the others.

    The relevance of a token is its cosine similarity with the embeddings of the prompt's text, each weighted by a
    softmax over these similarities, then sharpened until few tokens stand out. It is multiplied with the attention of
    CLS, as powers ``eta`` and ``1 - eta``. The best tokens stay; of the rest the ones most like another are dropped, a
    few at a time, until the budget is met. The text is all of the prompt's, instructions to the model included, and
    all constants are those of the authors' code for LLaVA. An image is one set of tokens with all its crops; the
    authors reduce every crop by itself.

    Args:
        keep: tokens to keep of each image: a share in (0, 1], or a count.
        eta: how much the text counts against CLS, in [0, 1].
        important: share of the budget for the best tokens, in [0, 1]; what remains of it is for the diverse ones.
        at_once: tokens that leave the rest in one step; more steps compare what is left more often, and take longer.
        layer: of the encoder, whose CLS and hidden states are read, counted from 0, or negative from the end.
        positions: in the language model: "gapless" as in the authors' LLaVA, or "original".

    Raises:
        ThriftError: a ``keep`` outside (0, 1] or below 1, shares outside [0, 1], no token at once, a layer that
            the encoder does not have, unknown positions; an encoder without CLS, for which there are ``hiprune`` and
            ``divprune``.
    """

    keep: int | float = 0.222
    eta: float = 0.5
    important: float = 0.5
    at_once: int = 8
    layer: int = -2
    positions: str = "gapless"

    def __post_init__(self) -> None:
        Budget.of(self.keep)
        check_share("flashvlm", "eta", self.eta)
        check_share("flashvlm", "important", self.important)
        if self.at_once < 1:
            raise ThriftError(f"flashvlm at_once={self.at_once} drops none: write 8, the authors' number, or more")
        check_positions("flashvlm", self.positions)

    def encoder_layers(self, count: int) -> tuple[int]:
        """The layer that is read, of an encoder with ``count``."""
        return (encoder_layer("flashvlm", "layer", self.layer, count),)

    def reduce(self, view: View) -> TokenMap:
        wanted = to_keep(view, self.keep)
        if wanted is None:
            return keep_all(view)
        free, counts = wanted
        attention, hidden = view.cls(self.layer).mean(1), view.hidden(self.layer)
        chosen = torch.zeros_like(free)
        for row, count in enumerate(counts.tolist()):
            tokens = free[row].nonzero()[:, 0]
            found = relevance(view.features[row, tokens], view.text[row][view.text_mask[row]])
            seen = _to_unit(attention[row, tokens].to(torch.float32))
            score = seen.clamp(min=EPS) ** (1 - self.eta) * found.clamp(min=EPS) ** self.eta
            order = score.argsort(descending=True, stable=True)
            best = int(count * self.important)
            diverse = thin_out(hidden[row, tokens[order[best:]]], count - best, self.at_once)
            chosen[row, tokens[torch.cat([order[:best], order[best:][diverse]])]] = True
        return keep_chosen(view, chosen)


def relevance(features: Tensor, text: Tensor) -> Tensor:
    """How much ``(tokens, dim)`` visual tokens are what ``(words, dim)`` are about: ``(tokens,)``, in [0, 1].

    Without words it is 0 of all.
    """
    if not len(text):
        return features.new_zeros(len(features), dtype=torch.float32)
    like = normalize(features.to(torch.float32), dim=-1) @ normalize(text.to(torch.float32), dim=-1).T
    like = (like * (like / WORDS).softmax(-1)).sum(-1)
    sharp = _to_unit((like / TOKENS).softmax(0) ** POWER)
    return _to_unit(torch.where(sharp >= sharp.quantile(1 - BRIGHT), sharp, sharp * DIM))


def thin_out(hidden: Tensor, count: int, at_once: int) -> Tensor:
    """Which ``count`` of ``(tokens, dim)`` are left when those that are most like another one go.

    So many go at once, of those at even places the ones that are most like one at an odd place. Then those that stay at
    even places come first, by falling likeness, and after them those at odd places.
    """
    unit = normalize(hidden.to(torch.float32), dim=-1)
    like = unit @ unit.T  # once: every step reads a part of it
    left = torch.arange(len(hidden), device=hidden.device)
    if not count:
        return left[:0]
    while len(left) > count:
        even, odd = left[::2], left[1::2]
        alike = like.index_select(0, even).index_select(1, odd).amax(-1)
        staying = alike.argsort(descending=True, stable=True)[min(at_once, len(left) - count) :]
        left = torch.cat([even[staying], odd])
    return left


def _to_unit(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min() + EPS)
