"""Attention of query rows over many keys: what ranking tokens needs, without ever holding the N×N matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad, scaled_dot_product_attention

from ..core.tokenmap import TokenMap


def attention_rows(queries: Tensor, keys: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Causal softmax attention of the last queries, in float32.

    Args:
        queries: ``(batch, heads, rows, dim)``, the queries of the last ``rows`` of the ``n`` tokens.
        keys: ``(batch, kv_heads, n, dim)``; ``heads`` is a multiple of ``kv_heads``, groups are consecutive heads.
        scaling: factor on ``q·k``.
        mask: ``(batch, n)`` bool, true for real tokens. Padding keys get 0, and rows of padding queries are all 0.

    Returns:
        ``(batch, heads, rows, n)`` float32.
    """
    batch, heads, rows, dim = queries.shape
    kv_heads, n = keys.shape[1], keys.shape[2]
    grouped = queries.reshape(batch, kv_heads, -1, dim)  # the query heads of a group share their keys: one matmul
    logits = (grouped.to(torch.float32) * scaling) @ keys.to(torch.float32).transpose(-1, -2)
    logits = logits.view(batch, heads, rows, n)
    position = torch.arange(n, device=keys.device)
    hidden = position > position[n - rows :, None]  # (rows, n): keys after the query
    if mask is not None:
        hidden = hidden | ~mask[:, None, None, :]
        hidden = hidden & mask[:, None, n - rows :, None]  # a padding query sees all, so that its row has no NaN …
    out = logits.masked_fill_(hidden, float("-inf")).softmax(-1)
    return out if mask is None else out * mask[:, None, n - rows :, None]  # … and then counts for nothing


def attention_over(queries: Tensor, keys: Tensor, scaling: float, mask: Tensor) -> Tensor:
    """Softmax attention of queries that come after all keys, in float32.

    Args:
        queries: ``(batch, heads, rows, dim)``.
        keys, scaling: as for :func:`attention_rows`.
        mask: ``(batch, n)`` bool, true for the keys that are seen.

    Returns:
        ``(batch, heads, rows, n)`` float32.
    """
    batch, heads, rows, dim = queries.shape
    grouped = queries.reshape(batch, keys.shape[1], -1, dim).to(torch.float32) * scaling
    logits = grouped @ keys.to(torch.float32).transpose(-1, -2)
    return logits.masked_fill_(~mask[:, None, None], float("-inf")).softmax(-1).view(batch, heads, rows, -1)


def attention_received(
    queries: Tensor, keys: Tensor, scaling: float, mask: Tensor | None = None, block: int = 128
) -> Tensor:
    """How much attention each token receives in all: the column sums of causal attention, in float32.

    The queries are taken ``block`` at a time, each block with the keys that it can see.

    Args:
        queries: ``(batch, heads, rows, dim)``, those of the last ``rows`` of the ``n`` tokens.
        keys, scaling, mask: as for :func:`attention_rows`.
        block: how many rows of the matrix exist at once.

    Returns:
        ``(batch, heads, n)`` float32; padding receives nothing and gives nothing.
    """
    n, rows = keys.shape[-2], queries.shape[-2]
    received = torch.zeros(*queries.shape[:2], n, dtype=torch.float32, device=queries.device)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        end = n - rows + stop
        seen = None if mask is None else mask[:, :end]
        received[..., :end] += attention_rows(queries[:, :, start:stop], keys[:, :, :end], scaling, seen).sum(-2)
    return received


def window_scores(rows: Tensor, kv_heads: int, kernel: int, pooling: str = "mean", group: str = "mean") -> Tensor:
    """Scores by the attention of the prompt's last queries, with these queries' own tokens above all others.

    Args:
        rows: ``(batch, heads, window, n)``, the last ``window`` rows of attention.
        kv_heads: number of key/value heads.
        kernel: odd width of the pooling along the prompt, so that neighbours of an important token survive.
        pooling: ``"mean"`` or ``"max"``.
        group: of the votes of the query heads that share a key/value head, the ``"mean"`` or the ``"max"``.

    Returns:
        ``(batch, kv_heads, n)``: votes in [0, 1], then the window from 2 on, newest highest.
    """
    window, n = rows.shape[-2:]
    votes = rows[..., : n - window].mean(-2)
    votes = votes.reshape(votes.shape[0], kv_heads, -1, n - window)
    votes = votes.mean(2) if group == "mean" else votes.amax(2)
    pool = avg_pool1d if pooling == "mean" else max_pool1d
    votes = pool(votes, kernel, stride=1, padding=kernel // 2)
    recent = 2 + torch.arange(window, device=rows.device, dtype=rows.dtype)
    return torch.cat([votes, recent.expand(*votes.shape[:-1], window)], dim=-1)


def group_mean(scores: Tensor, kv_heads: int) -> Tensor:
    """Mean over the query heads that share a key/value head: ``(batch, heads, …)`` to ``(batch, kv_heads, …)``."""
    return scores.reshape(scores.shape[0], kv_heads, -1, *scores.shape[2:]).mean(2)


def fuse_attention(attention: Tensor, map: TokenMap) -> Tensor:
    """``W A P^T``: attention between merged tokens, from that between the tokens before.

    A merged query attends as its sources do on average; a merged key receives what its sources received together, so
    rows that sum to one still do (Multi-criteria Token Fusion, arXiv 2403.10030, section 3.3).

    This is the reference; :func:`attend_fused` is what layers use.

    Args:
        attention: ``(batch, heads, n_in, n_in)``.
        map: of ``(batch,)`` rows with ``n_in`` tokens.

    Returns:
        ``(batch, heads, n_out, n_out)``.
    """
    rows, columns = (matrix.unsqueeze(1).to(attention.dtype) for matrix in (map.dense(), map.dense_share()))
    return rows @ attention @ columns.transpose(-1, -2)


def attend_fused(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    map: TokenMap,
    scaling: float,
    bias: Tensor | None = None,
    attention: Tensor | None = None,
) -> Tensor:
    """What merged tokens get from fused attention: ``W (A (P^T V))``, which no matrix has to be fused for.

    ``P^T V`` hands every token before the merge the value of the token that it is a part of.

    Args:
        queries, keys: ``(batch, heads, n_in, dim)`` of before the merge.
        values: ``(batch, heads, n_out, dim)`` of after it.
        map: the merge.
        scaling: factor on ``q·k``.
        bias: to be added to the scores.
        attention: ``A`` ``(batch, heads, n_in, n_in)`` if it is known: then queries and keys are not read.

    Returns:
        ``(batch, heads, n_out, dim)``.
    """
    if map.exclusive and map.share is None:
        spread = per_head(map.unmerge, values)
    else:
        spread = map.dense_share().unsqueeze(1).transpose(-1, -2).to(values.dtype) @ values
    if attention is None:
        mask = None if bias is None else bias.to(queries.dtype)
        mixed = scaled_dot_product_attention(queries, keys, spread, attn_mask=mask, scale=scaling)
    else:
        mixed = attention.to(spread.dtype) @ spread
    return per_head(map.apply, mixed)


def augment_keys(
    queries: Tensor, keys: Tensor, sizes: Tensor, scaling: float, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Proportional attention without a mask: queries and keys with one channel more, which adds ``log(sizes)``.

    ``q' = [q, 1]`` and ``k' = [k, log(size) / scaling]``, so ``softmax(q' k'ᵀ · scaling)`` counts each key as often as
    it has tokens (Token Merging, arXiv 2210.09461, section 3.3). For kernels that take no additive mask; give them
    ``scaling`` explicitly, since the default is that of the wider head. Half precision rounds the logarithms with
    the keys.

    Args:
        queries: ``(batch, heads, rows, dim)``.
        keys: ``(batch, kv_heads, tokens, dim)``.
        sizes: ``(batch, tokens)`` how many tokens each key stands for; a size of 0 hides it.
        scaling: factor on ``q·k``.
        multiple: zero channels fill the heads up to a multiple of this, as kernels may want; 8, say.

    Returns:
        Both with ``dim + 1`` channels, or the next multiple.
    """
    channel = (sizes.to(torch.float32).log() / scaling).to(keys.dtype)[:, None, :, None]
    channel = channel.expand(*keys.shape[:-1], 1)
    wide_queries = torch.cat([queries, torch.ones_like(queries[..., :1])], dim=-1)
    wide_keys = torch.cat([keys, channel], dim=-1)
    spare = -wide_keys.shape[-1] % multiple
    return pad(wide_queries, (0, spare)), pad(wide_keys, (0, spare))


def attend_selected(queries: Tensor, keys: Tensor, values: Tensor, map: TokenMap, scaling: float) -> Tensor:
    """Causal attention among the tokens that each head has selected; the others get zeros.

    Args:
        queries: ``(batch, heads, n, dim)``.
        keys, values: ``(batch, kv_heads, n, dim)``.
        map: selections over ``(batch, heads)``, in the order of the tokens; padding outputs come last.
        scaling: factor on ``q·k``.

    Returns:
        ``(batch, heads, n, dim of values)``.
    """
    batch, heads, n, _ = queries.shape
    kv_heads = keys.shape[1]
    row = torch.arange(batch, device=keys.device)[:, None, None]
    head = torch.arange(heads, device=keys.device)[:, None]
    shared = head // (heads // kv_heads)
    # Padding comes after all that is real, so causality hides it.
    out = scaled_dot_product_attention(
        queries[row, head, map.source],
        keys[row, shared, map.source],
        values[row, shared, map.source],
        is_causal=True,
        scale=scaling,
    )
    slot = torch.where(map.mask, map.source, n).unsqueeze(-1).expand_as(out)
    return out.new_zeros(batch, heads, n + 1, out.shape[-1]).scatter_(2, slot, out)[:, :, :n]


def per_head(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of ``(batch, tokens, dim)`` to ``(batch, heads, tokens, head_dim)``, to all heads at once."""
    out = function(x.transpose(1, 2).flatten(2))
    return out.reshape(*out.shape[:2], x.shape[1], -1).transpose(1, 2)
