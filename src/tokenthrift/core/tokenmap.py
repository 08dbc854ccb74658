"""TokenMap: the one result of every token reduction, an explicit sparse linear map from old tokens to new ones.

Pruning is a map with one-hot rows, merging sends several tokens to one, token transforming (arXiv 2506.05709) is the
general many-to-many case. Notation used below: ``W`` is the row-stochastic ``(n_out, n_in)`` matrix that averages
tokens, ``P`` the matrix of shares that says how much of a token's *mass* goes where (its columns sum to at most 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

PositionMode = Literal["first", "mean", "anchor"]


@dataclass(frozen=True, eq=False)
class TokenMap:
    """A batched sparse map from ``n_in`` input tokens to ``n_out`` output tokens, stored as edges.

    ``lead`` is any leading shape that the edges share: ``(batch,)`` for encoders, ``(batch, kv_heads)`` for caches.
    Ragged batches need no extra field: an output that no edge feeds is padding (see :attr:`mask`).

    Attributes:
        source: ``(*lead, edges)`` int64, the input token of each edge.
        target: ``(*lead, edges)`` int64, the output token it feeds; -1 marks a padding edge.
        weight: ``(*lead, edges)`` float, entries of ``W``: they sum to one over the edges of an output.
        share: ``(*lead, edges)`` float, entries of ``P``; None when every token gives all its mass to one output.
        n_in, n_out: padded lengths before and after.
        anchor: ``(*lead, n_out)`` int64, the input token that an output stands at; None = the heaviest source.
    """

    source: Tensor
    target: Tensor
    weight: Tensor
    n_in: int
    n_out: int
    share: Tensor | None = None
    anchor: Tensor | None = None

    def __post_init__(self) -> None:
        for name, length in (
            ("target", self.n_edges),
            ("weight", self.n_edges),
            ("share", self.n_edges),
            ("anchor", self.n_out),
        ):
            _check_shape(name, getattr(self, name), (*self.lead, length))

    # ---- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def identity(cls, n: int, lead: Sequence[int] = (1,), device: torch.device | str = "cpu") -> TokenMap:
        """The map that changes nothing."""
        return cls.select(torch.arange(n, device=device).expand(*lead, n), n)

    @classmethod
    def select(cls, index: Tensor, n_in: int) -> TokenMap:
        """Keep the tokens at ``index`` ``(*lead, n_out)``, in that order; an index of -1 is padding."""
        n_out = index.shape[-1]
        if n_in == 0:
            index = index[..., :0]  # there is no token that even a padding edge could start from
        slots = torch.arange(index.shape[-1], device=index.device).expand(index.shape)
        real = index >= 0
        made = cls(
            source=index.clamp(min=0),
            target=torch.where(real, slots, -1),
            weight=real.to(torch.float32),
            n_in=n_in,
            n_out=n_out,
        )
        if n_in:
            made.__dict__.update(is_selection=True, mask=real, _real=real)  # cached properties that are known
        return made

    @classmethod
    def keep(cls, mask: Tensor) -> TokenMap:
        """Keep, in order, the tokens where ``mask`` ``(*lead, n_in)`` is true; rows may keep different numbers."""
        n_out = int(mask.sum(-1).max()) if mask.numel() else 0
        # A stable sort of "dropped" puts the kept tokens first without changing their order.
        index = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)[..., :n_out]
        return cls.select(torch.where(mask.gather(-1, index), index, -1), mask.shape[-1])

    @classmethod
    def merge(
        cls, group: Tensor, n_out: int | None = None, weight: Tensor | None = None, anchor: Tensor | None = None
    ) -> TokenMap:
        """Average the tokens of each group.

        Args:
            group: ``(*lead, n_in)`` int64, the output that each token joins; -1 drops the token.
            n_out: number of outputs; the highest group + 1 when None.
            weight: ``(*lead, n_in)`` non-negative masses, e.g. the sizes of already merged tokens; all one when None.
            anchor: ``(*lead, n_out)`` the token that each output stands at.
        """
        if n_out is None:
            n_out = int(group.max()) + 1 if group.numel() else 0
        mass = torch.ones(group.shape, device=group.device) if weight is None else weight.to(torch.float32)
        _check_shape("weight", mass, tuple(group.shape))
        real = group >= 0
        slot = torch.where(real, group, n_out)  # the dropped share a spare group

        def of_group(mass: Tensor) -> Tensor:
            return mass.new_zeros(*group.shape[:-1], n_out + 1).scatter_add_(-1, slot, mass).gather(-1, slot)

        if weight is not None:
            mass = torch.where(of_group(mass) > 0, mass, 1)  # a group without any mass: its plain mean
        made = cls(
            source=torch.arange(group.shape[-1], device=group.device).expand(group.shape),
            target=group,
            weight=mass / of_group(mass) * real,
            n_in=group.shape[-1],
            n_out=n_out,
            anchor=anchor,
        )
        # Each token is the source of just one edge, so these cached properties are known.
        made.__dict__.update(exclusive=True, owner=group, kept=real, _real=real)
        return made

    @classmethod
    def join(
        cls,
        group: Tensor,
        anchor: Tensor,
        weight: Tensor | None = None,
        share: Tensor | None = None,
        drops: bool = False,
        giver: Tensor | None = None,
    ) -> TokenMap:
        """:meth:`merge` where no group is empty: nothing has to be searched for.

        Args:
            group: ``(*lead, n_in)`` int64, the output that each token joins.
            anchor: ``(*lead, n_out)`` int64, the token that each output stands at.
            weight: ``(*lead, n_in)`` non-negative masses; all one when None. A group without any mass: its plain mean.
            share: ``(*lead, n_in)`` positive, how much of its own mass each token hands on; all of it when None.
            drops: some tokens are dropped: their ``group`` is -1.
            giver: ``(*lead, n_in - n_out)`` int64, all tokens but the anchors, where each of these is in its group. If
                they are few, features are merged faster.
        """
        n_in, n_out = group.shape[-1], anchor.shape[-1]
        mass = torch.ones(group.shape, device=group.device) if weight is None else weight.to(torch.float32)
        _check_shape("weight", mass, tuple(group.shape))
        if weight is not None:
            mass = mass.clamp(min=torch.finfo(torch.float32).tiny)
        real = group >= 0 if drops else torch.ones((), dtype=torch.bool, device=group.device).expand(group.shape)
        slot = torch.where(real, group, n_out) if drops else group  # the dropped share a spare group
        total = mass.new_zeros(*anchor.shape[:-1], n_out + drops).scatter_add(-1, slot, mass)
        mean = mass / total.gather(-1, slot)
        made = cls(
            source=torch.arange(n_in, device=group.device).expand(group.shape),
            target=group,
            weight=mean * real if drops else mean,
            n_in=n_in,
            n_out=n_out,
            share=share,
            anchor=anchor,
        )
        # The cached properties, all known here.
        made.__dict__.update(
            exclusive=True,
            owner=group,
            kept=real,
            mask=torch.ones((), dtype=torch.bool, device=group.device).expand(anchor.shape),
            _real=real,
            _drops=drops,
            padded=False,
        )
        if share is None:
            made.__dict__["_mass"] = (weight, total[..., :n_out])
        if giver is not None:
            joined = group.gather(-1, giver)
            made.__dict__["_few"] = (
                (_flat(anchor, n_in), mean.gather(-1, anchor).view(-1, 1)),
                (_flat(giver, n_in), mean.gather(-1, giver).view(-1, 1), _flat(joined, n_out)),
            )
        return made

    @classmethod
    def transform(cls, share: Tensor, sizes: Tensor | None = None, anchor: Tensor | None = None) -> TokenMap:
        """The general map of a dense share matrix ``P`` ``(*lead, n_out, n_in)``: ``W = diag(P s)^-1 P diag(s)``.

        Args:
            share: ``P``; an input of which no output takes a share is dropped.
            sizes: ``s`` ``(*lead, n_in)``; all one when None.
            anchor: ``(*lead, n_out)`` the token that each output stands at.
        """
        share = share.to(torch.float32)
        _check_shape("sizes", sizes, (*share.shape[:-2], share.shape[-1]))
        mass = share if sizes is None else share * sizes.unsqueeze(-2)
        return cls._of_matrices(
            mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny), share, anchor
        )

    @classmethod
    def _of_matrices(cls, weight: Tensor, share: Tensor, anchor: Tensor | None = None) -> TokenMap:
        """The map of dense ``W`` and ``P``; their entries are the edges."""
        n_out, n_in = share.shape[-2:]
        real = share > 0
        made = cls(
            source=torch.arange(n_in, device=share.device).expand(share.shape).flatten(-2),
            target=torch.where(real, torch.arange(n_out, device=share.device).unsqueeze(-1), -1).flatten(-2),
            weight=weight.flatten(-2),
            n_in=n_in,
            n_out=n_out,
            share=share.flatten(-2),
            anchor=anchor,
        )
        made.__dict__.update(_full=True, mask=real.any(-1), kept=real.any(-2))
        return made

    @classmethod
    def stack(cls, maps: Sequence[TokenMap]) -> TokenMap:
        """Concatenate maps along the first leading dimension, padding to the longest (images of different counts)."""
        if len({m.lead[1:] for m in maps}) != 1:
            raise ValueError(f"maps to stack must agree in all leading dimensions but the first: {list(maps)}")
        edges, n_in, n_out = (max(getattr(m, f) for m in maps) for f in ("n_edges", "n_in", "n_out"))
        shared, anchored = any(m.share is not None for m in maps), any(m.anchor is not None for m in maps)
        return cls(
            source=torch.cat([_pad(m.source, edges, 0) for m in maps]),
            target=torch.cat([_pad(m.target, edges, -1) for m in maps]),
            weight=torch.cat([_pad(m.weight, edges, 0) for m in maps]),
            n_in=n_in,
            n_out=n_out,
            share=torch.cat([_pad(m._share, edges, 0) for m in maps]) if shared else None,
            anchor=torch.cat([_pad(m.anchors, n_out, 0) for m in maps]) if anchored else None,
        )

    # ---- what it is -------------------------------------------------------------------------------------------------

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.source.shape[:-1])

    @property
    def n_edges(self) -> int:
        return self.source.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.source.device

    @property
    def _share(self) -> Tensor:
        return torch.ones_like(self.weight) if self.share is None else self.share

    @cached_property
    def _real(self) -> Tensor:
        return self.target >= 0

    @cached_property
    def mask(self) -> Tensor:
        """``(*lead, n_out)`` bool: the outputs that are real, not padding."""
        return self._scatter(self._real, self.n_out) > 0

    @cached_property
    def kept(self) -> Tensor:
        """``(*lead, n_in)`` bool: the inputs that feed some output."""
        hits = torch.zeros(*self.lead, self.n_in, device=self.device)
        return hits.scatter_add_(-1, self.source, self._real.to(hits.dtype)) > 0

    @cached_property
    def _mass(self) -> tuple[Tensor | None, Tensor | None]:
        """Sizes whose :meth:`sizes` are known, and these."""
        return None, None

    @cached_property
    def _full(self) -> bool:
        """True where there is an edge for every entry of the matrices, in their order."""
        return False

    @cached_property
    def _drops(self) -> bool:
        return not bool(self.kept.all())

    @cached_property
    def padded(self) -> bool:
        """True when some output is no token, but padding."""
        return not bool(self.mask.all())

    @cached_property
    def exclusive(self) -> bool:
        """True for pruning and merging: every input feeds at most one output."""
        fan_out = torch.zeros(*self.lead, self.n_in, device=self.device)
        return bool((fan_out.scatter_add_(-1, self.source, self._real.to(fan_out.dtype)) <= 1).all())

    @cached_property
    def is_selection(self) -> bool:
        """True when output ``i`` is exactly the input of edge ``i``: applying is a bit-exact gather."""
        if self.n_edges != self.n_out:
            return False
        slots = torch.arange(self.n_out, device=self.device)
        return bool(((self.target == slots) | (self.target < 0)).all() and (self.weight[self._real] == 1).all())

    @property
    def is_identity(self) -> bool:
        """True when nothing changes."""
        slots = torch.arange(self.n_out, device=self.device)
        return self.n_in == self.n_out and self.is_selection and bool(((self.source == slots) & self._real).all())

    @cached_property
    def _bags(self) -> tuple[Tensor, Tensor, Tensor]:
        """The edges as :meth:`apply` wants them: in the order of the outputs, with flattened leading dimensions.

        Their sources, their weights, and where the edges of each output start; those after the last one are padding.
        """
        outputs = math.prod(self.lead) * self.n_out
        slot = torch.where(self._real.flatten(), _flat(self.target, self.n_out), outputs)
        slot, order = slot.sort(stable=True)
        start = torch.searchsorted(slot, torch.arange(outputs + 1, device=self.device))
        return _flat(self.source, self.n_in)[order], self.weight.flatten()[order], start

    @cached_property
    def _few(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None:
        """Where few tokens join others: of the anchors the sources and weights, of the others these and the targets."""
        return None

    @cached_property
    def owner(self) -> Tensor:
        """``(*lead, n_in)`` int64: the output that each input gives most of its mass to, -1 if dropped."""
        if self.exclusive:
            owner = torch.full((*self.lead, self.n_in + 1), -1, device=self.device)
            slot = torch.where(self._real, self.source, self.n_in)  # padding edges write into a spare column
            return owner.scatter_(-1, slot, self.target)[..., : self.n_in]
        dense = self._dense(self._share)
        return torch.where(dense.sum(-2) > 0, dense.argmax(-2), -1)

    @cached_property
    def anchors(self) -> Tensor:
        """``(*lead, n_out)`` int64: the input token that each output stands at (the heaviest source if not given)."""
        if self.anchor is not None:
            return self.anchor
        if self.is_selection:
            return self.source
        # Over the edges, not the dense matrix; the first of equally heavy sources.
        slot = torch.where(self._real, self.target, self.n_out)
        heaviest = self.weight.new_zeros(*self.lead, self.n_out + 1).scatter_reduce_(-1, slot, self.weight, "amax")
        source = torch.where(self.weight == heaviest.gather(-1, slot), self.source, self.n_in)
        first = self.source.new_zeros(*self.lead, self.n_out + 1)
        return first.scatter_reduce_(-1, slot, source, "amin", include_self=False)[..., : self.n_out]

    def dense(self) -> Tensor:
        """``W`` as ``(*lead, n_out, n_in)`` float32."""
        return self._dense(self.weight)

    def dense_share(self) -> Tensor:
        """``P`` as ``(*lead, n_out, n_in)`` float32: how much of each input's mass goes to each output."""
        return self._dense(self._share)

    # ---- using it ---------------------------------------------------------------------------------------------------

    def apply(self, x: Tensor) -> Tensor:
        """``W x``: ``(*lead, n_in, dim)`` to ``(*lead, n_out, dim)``, in ``x``'s dtype; padding outputs are zero."""
        if x.shape[:-1] != (*self.lead, self.n_in):
            raise ValueError(f"this map takes {(*self.lead, self.n_in)} tokens, got features of shape {tuple(x.shape)}")
        if self.is_selection:
            out = _rows(x, self.source)
            return out.masked_fill(~self.mask.unsqueeze(-1), 0) if self.padded else out
        if not self.n_edges:
            return x.new_zeros(*self.lead, self.n_out, x.shape[-1])
        # Half precision sums are kept in float32: a merged token may average hundreds of others.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.n_edges > max(4 * (self.n_in + self.n_out), self.n_in * self.n_out // 2):
            out = (self.dense().to(wide.dtype) @ wide).to(x.dtype)  # beats a sum over so many edges
            return out.masked_fill(~self.mask.unsqueeze(-1), 0) if self.padded else out
        flat = wide.flatten(0, -2)
        if self._few is not None:
            (first, of_first), (more, of_more, target) = self._few
            out = flat.index_select(0, first).mul_(of_first)
            out.index_add_(0, target, flat.index_select(0, more).mul_(of_more))
            return out.to(x.dtype).view(*self.lead, self.n_out, x.shape[-1])
        source, weight, start = self._bags
        weight = weight.to(wide.dtype)
        out = embedding_bag(source, flat, start, mode="sum", per_sample_weights=weight)[:-1]
        return out.to(x.dtype).view(*self.lead, self.n_out, x.shape[-1])

    def unmerge(self, y: Tensor, fill: Tensor | None = None, lift: Literal["copy", "pinv"] = "copy") -> Tensor:
        """Back to the input tokens: ``(*lead, n_out, dim)`` to ``(*lead, n_in, dim)``.

        ``copy`` gives every input the (share-weighted) value of the outputs it fed; for pruning and merging then
        ``W U = I``. ``pinv`` is the least-squares lift, for which ``W U = I`` also holds for many-to-many maps of full
        rank. Dropped inputs are zero, or the rows of ``fill`` ``(*lead, n_in, dim)``.
        """
        if y.shape[:-1] != (*self.lead, self.n_out):
            raise ValueError(f"this map gave {(*self.lead, self.n_out)} tokens, got features of shape {tuple(y.shape)}")
        _check_shape("fill", fill, (*self.lead, self.n_in, y.shape[-1]))
        if lift == "pinv":
            out = (torch.linalg.pinv(self.dense()) @ y.to(torch.float32)).to(y.dtype)
        elif self.exclusive:
            out = _rows(y, self.owner.clamp(min=0))
            if self._drops:
                out = out.masked_fill(~self.kept.unsqueeze(-1), 0)
        elif self._full:
            share = self.dense_share()
            share = share / share.sum(-2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            out = (share.transpose(-1, -2) @ y.to(torch.float32)).to(y.dtype)
        else:
            given = self._share * self._real
            total = torch.zeros(*self.lead, self.n_in, device=self.device).scatter_add_(-1, self.source, given)
            weight = given / total.gather(-1, self.source).clamp(min=torch.finfo(torch.float32).tiny)
            target = torch.where(self._real, self.source, -1)
            back = TokenMap(self.target.clamp(min=0), target, weight, n_in=self.n_out, n_out=self.n_in)
            out = back.apply(y)
        return out if fill is None else torch.where(self.kept.unsqueeze(-1), out, fill)

    def sizes(self, sizes: Tensor | None = None) -> Tensor:
        """``P s``: original tokens that each output stands for, ``(*lead, n_out)``; ``sizes`` are the inputs'."""
        weighed, total = self._mass
        if total is not None and weighed is sizes:
            return total
        _check_shape("sizes", sizes, (*self.lead, self.n_in))
        if self._full:
            share = self.dense_share()
            return share.sum(-1) if sizes is None else (share @ sizes.to(share.dtype).unsqueeze(-1)).squeeze(-1)
        given = self._share if sizes is None else self._share * sizes.gather(-1, self.source)
        return self._scatter(given, self.n_out)

    def positions(self, mode: PositionMode = "first", positions: Tensor | None = None) -> Tensor:
        """Positions of the outputs ``(*lead, n_out)``: of the first source, the weighted mean, or the anchor.

        ``positions`` ``(*lead, n_in)`` are those of the inputs, 0…n_in-1 when None. Padding outputs get 0.
        """
        if positions is None:
            positions = torch.arange(self.n_in, device=self.device).expand(*self.lead, self.n_in)
        _check_shape("positions", positions, (*self.lead, self.n_in))
        if mode == "anchor":
            return _take(positions, self.anchors, self.mask, 0)
        of_edge = positions.gather(-1, self.source)
        if mode == "mean":
            return self._scatter(of_edge * self.weight, self.n_out)
        if mode != "first":
            raise ValueError(f"unknown position mode {mode!r}; use 'first', 'mean' or 'anchor'")
        slot = torch.where(self._real, self.target, self.n_out)
        out = positions.new_zeros(*self.lead, self.n_out + 1)
        return out.scatter_reduce_(-1, slot, of_edge, "amin", include_self=False)[..., : self.n_out]

    def then(self, after: TokenMap) -> TokenMap:
        """The composition: first this map, then ``after``. ``W = W_after W``, ``P = P_after P``."""
        if (*self.lead, self.n_out) != (*after.lead, after.n_in):
            raise ValueError(
                f"cannot compose: the first map gives {(*self.lead, self.n_out)} tokens, "
                f"the second takes {(*after.lead, after.n_in)}"
            )
        # Always the anchor's anchor, so that composing in any order gives the same.
        anchor = _take(self.anchors, after.anchors, after.mask, 0)
        shared = self.share is not None or after.share is not None
        if self.is_selection and after.is_selection and not shared:
            index = _take(torch.where(self.mask, self.source, -1), after.source, after.mask, -1)
            return replace(TokenMap.select(index, self.n_in), anchor=anchor)
        if self.exclusive and after.exclusive:  # every edge of the first map has at most one continuation
            mid, real = self.target, self._real

            def second(values: Tensor) -> Tensor:
                of_mid = torch.zeros(*after.lead, after.n_in, device=self.device)
                of_mid = of_mid.scatter_add_(-1, after.source, values * (after.target >= 0))
                return _take(of_mid, mid, real, 0)

            return TokenMap(
                source=self.source,
                target=_take(after.owner, mid, real, -1),
                weight=self.weight * second(after.weight),
                n_in=self.n_in,
                n_out=after.n_out,
                share=self._share * second(after._share) if shared else None,
                anchor=anchor,
            )
        weight = after.dense() @ self.dense()
        share = after._dense(after._share) @ self._dense(self._share)
        return TokenMap._of_matrices(weight, share, anchor)

    def extend(self, n: int) -> TokenMap:
        """This map, and ``n`` more tokens after the others that stay what they are."""
        if n == 0:
            return self
        new_in, new_out = (
            torch.arange(m, m + n, device=self.device).expand(*self.lead, n) for m in (self.n_in, self.n_out)
        )
        if self.is_selection and self.share is None:
            index = torch.cat([torch.where(self.mask, self.source, -1), new_in], dim=-1)
            made = TokenMap.select(index, self.n_in + n)
            return made if self.anchor is None else replace(made, anchor=torch.cat([self.anchor, new_in], dim=-1))
        ones = self.weight.new_ones(*self.lead, n)
        return TokenMap(
            source=torch.cat([self.source, new_in], dim=-1),
            target=torch.cat([self.target, new_out], dim=-1),
            weight=torch.cat([self.weight, ones], dim=-1),
            n_in=self.n_in + n,
            n_out=self.n_out + n,
            share=None if self.share is None else torch.cat([self.share, ones], dim=-1),
            anchor=torch.cat([self.anchors, new_in], dim=-1),
        )

    def provenance(self) -> list[list[list[tuple[int, float]]]]:
        """For every batch row (leading dimensions flattened) and output: its ``(input token, weight)`` pairs."""
        batch = math.prod(self.lead)
        rows = (t.reshape(batch, self.n_edges).tolist() for t in (self.source, self.target, self.weight))
        out: list[list[list[tuple[int, float]]]] = []
        for sources, targets, weights in zip(*rows, strict=True):
            per_output: list[list[tuple[int, float]]] = [[] for _ in range(self.n_out)]
            for s, t, w in zip(sources, targets, weights, strict=True):
                if t >= 0:
                    per_output[t].append((s, w))
            out.append([sorted(pairs) for pairs in per_output])
        return out

    def to(self, device: torch.device | str) -> TokenMap:
        """The same map on another device."""
        moved: dict[str, Any] = {f: getattr(self, f) for f in ("source", "target", "weight", "share", "anchor")}
        changes: dict[str, Any] = {f: None if t is None else t.to(device) for f, t in moved.items()}
        return replace(self, **changes)

    def __repr__(self) -> str:
        return f"TokenMap({self.n_in} -> {self.n_out}, lead={self.lead}, edges={self.n_edges})"

    # ---- scatter helpers --------------------------------------------------------------------------------------------

    def _scatter(self, values: Tensor, n: int) -> Tensor:
        """Sum edge values into their targets; padding edges go to a spare slot that is cut off."""
        slot = torch.where(self._real, self.target, n)
        out = torch.zeros(*self.lead, n + 1, device=self.device)
        return out.scatter_add_(-1, slot, values.to(out.dtype))[..., :n]

    def _dense(self, values: Tensor) -> Tensor:
        if self._full:
            return values.view(*self.lead, self.n_out, self.n_in)
        slot = torch.where(self._real, self.target * self.n_in + self.source, self.n_out * self.n_in)
        out = torch.zeros(*self.lead, self.n_out * self.n_in + 1, device=self.device)
        out.scatter_add_(-1, slot, values.to(out.dtype))
        return out[..., :-1].reshape(*self.lead, self.n_out, self.n_in)


def _flat(index: Tensor, n: int) -> Tensor:
    """``index`` ``(*lead, m)`` into ``(*lead, n)``, as an index into both flattened."""
    *lead, _ = index.shape
    if math.prod(lead) == 1:
        return index.flatten()
    return (index + n * torch.arange(math.prod(lead), device=index.device).view(*lead, 1)).flatten()


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` ``(*lead, n, dim)`` at ``index`` ``(*lead, m)``, several times faster than ``x.gather``."""
    if not x.shape[-2]:  # nothing to pick from: all indices stand for dropped tokens
        return x.new_zeros(*index.shape, x.shape[-1])
    return x.flatten(0, -2).index_select(0, _flat(index, x.shape[-2])).view(*index.shape, x.shape[-1])


def _pad(t: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(t, (0, length - t.shape[-1]), value=value)


def _take(values: Tensor, index: Tensor, real: Tensor, fill: int) -> Tensor:
    """``values`` at ``index`` along the last dimension; ``fill`` where ``real`` is false, whatever the index there."""
    n = values.shape[-1]
    return _pad(values, n + 1, fill).gather(-1, torch.where(real, index, n))


def _check_shape(name: str, t: Tensor | None, shape: tuple[int, ...]) -> None:
    if t is not None and t.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(t.shape)}")
