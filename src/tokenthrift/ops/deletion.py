"""Deleting tokens by a learned gate, with the position biases that go with them (MrT5, arXiv 2410.20771)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.tokenmap import TokenMap


def hard_delete(gate: Tensor, threshold: float, mask: Tensor | None = None) -> TokenMap:
    """Keep the tokens whose gate is above the threshold, in order; rows may keep different numbers.

    The kept tokens stand first and ``map.mask`` is the new padding mask. (The authors' code fills the padding with
    copies of the row's first token and masks it; here features there are zero.) It also raises an error when nothing
    at all is kept; here the map then has no outputs.

    Args:
        gate: ``(batch, n)``, between ``k`` (delete, say -30) and 0 (keep).
        threshold: half of ``k`` in the paper.
        mask: ``(batch, n)`` bool, true for real tokens; padding is deleted.
    """
    kept = gate > threshold
    return TokenMap.keep(kept if mask is None else kept & mask.bool())


def delete_bias(map: TokenMap, bias: Tensor) -> Tensor:
    """The rows and columns of a position bias that belong to the tokens kept by a selection.

    Kept tokens have the bias of their old distance: positions are not numbered anew. Rows and columns of padding are
    those of token 0; mask them.

    Args:
        map: a selection, such as :func:`hard_delete` gives.
        bias: ``(batch, heads, n, n)``; a batch of one holds for all rows.

    Returns:
        ``(batch, heads, n_out, n_out)``.
    """
    if not map.is_selection:
        raise ValueError(f"the position bias of merged tokens is not defined: {map}")
    index = torch.where(map.mask, map.source, 0)
    batch, heads, n = index.shape[0], bias.shape[1], map.n_out
    rows = bias.expand(batch, -1, -1, -1).gather(2, index[:, None, :, None].expand(-1, heads, -1, bias.shape[-1]))
    return rows.gather(3, index[:, None, None, :].expand(-1, heads, n, -1))
