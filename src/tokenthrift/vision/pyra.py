"""PYRA: token merging whose merged tokens are re-activated by a few learned weights a layer."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..ops.matching import bipartite_soft_matching, merged_pairs
from ..ops.schedules import Removal, check_removal, parse_r, to_remove


@method(
    "pyra",
    stage="vision",
    paper="PYRA: Parallel Yielding Re-Activation for Training-Inference Efficient Task Adaptation",
    arxiv="2403.09192",
    needs=("features", "keys", "sizes", "protected", "prefix", "grid"),
)
class Pyra:
    """Merge tokens as ToMe does, and modulate each merged token by what it and its receiver have in common.

    With the sum ``P = LayerNorm(source + receiver)`` ``(r, dim)`` of the ``r`` pairs of a layer, best match first, a
    source becomes ``source + source * channels * tokens`` before the average, where ``channels = 2 sigmoid(a^T P)``
    ``(1, dim)`` and ``tokens = 2 sigmoid(P b^T) - 1`` ``(r, 1)``; sources and receivers are weighted by their sizes.
    The weights are ``a`` ``(r, 1)``, ``b`` ``(dim,)`` and the LayerNorm of each layer: ``r + 3 dim`` numbers.
    ``learn_pyra`` trains them alone, on unlabelled images; without them ``b`` is zero, and PYRA is exactly ToMe.

    Deviation: the authors train on a task's labels, together with LoRA and a new head; here the features of the
    unmodified model are the target, and the model stays as it is.

    Parameters:
        keep, r, prop_attn: as in ``tome``, for PYRA without weights.
        weights: a file that ``learn_pyra`` wrote. ``a`` has an entry for each merged pair, so the file decides how many
            tokens each layer removes, and serves only the model and the image size that it was trained for.

    Raises:
        ThriftError: as ``tome``; a file that is none, or made for other layers, other ``r`` or smaller images.
    """

    per_layer: ClassVar[str] = "r"

    keep: float = 0.5
    r: Removal | None = None
    weights: str | PyraWeights | None = None
    prop_attn: bool = True
    _learned: PyraWeights | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", check_removal("pyra", self.keep, self.r, type(self).keep))
        if self.weights is None:
            return
        learned = self.weights if isinstance(self.weights, PyraWeights) else PyraWeights.load(self.weights)
        object.__setattr__(self, "_learned", learned)
        if self.keep != type(self).keep:
            raise ThriftError(f"pyra removes what its weights were trained for, r={learned.r}: leave keep out")
        if self.r is not None and parse_r(self.r, len(learned.r)) != learned.r:
            raise ThriftError(f"pyra weights {learned} were trained for r={learned.r}: leave r out, or train again")

    def reduce(self, view: View) -> TokenMap | None:
        """The merge of this layer; None where no token is to go."""
        r = self._to_remove(view)
        if r <= 0:
            return None
        groups = bipartite_soft_matching(view.keys.mean(1), r, view.protected)
        removed = 0 if groups is None else view.features.shape[1] - groups.n_groups
        if self._learned is not None and removed != r:
            raise ThriftError(
                f"pyra weights {self._learned} remove {r} tokens in layer {view.layer}, these images have only "
                f"{removed} to merge: use images as large as in training"
            )
        return None if groups is None else groups.map(view.sizes)

    def combine(self, view: View, map: TokenMap) -> Tensor:
        """The merged features, ``(batch, n_out, dim)``."""
        merged = map.apply(view.features)
        layer = None if self._learned is None else self._learned.layers[view.layer]
        if layer is None:
            return merged
        a, b, weight, bias = (t.to(merged.device) for t in layer)
        sources, receivers = merged_pairs(map, view.keys.mean(1))
        rows = torch.arange(len(merged), device=merged.device).unsqueeze(-1)
        mass = view.features.to(torch.float32) * view.sizes.unsqueeze(-1)
        source = mass[rows, sources]
        pairs = layer_norm(source + mass[rows, receivers], weight.shape, weight, bias)
        channels = 2 * torch.sigmoid(a.T @ pairs)
        tokens = 2 * torch.sigmoid(pairs @ b) - 1
        added = source * channels * tokens.unsqueeze(-1)
        added = torch.zeros(merged.shape, device=merged.device).index_put(
            (rows, map.owner.gather(1, sources)), added, accumulate=True
        )
        return merged + (added / map.sizes(view.sizes).unsqueeze(-1)).to(merged.dtype)

    def fresh(self, r: list[int], dim: int, model: str = "", seed: int = 0) -> Pyra:
        """This method with untrained weights, for a model of ``dim`` channels whose layers remove ``r`` tokens."""
        return replace(self, keep=type(self).keep, r=None, weights=PyraWeights.fresh(r, dim, model, seed))

    def _to_remove(self, view: View) -> int:
        learned = self._learned
        if learned is None:
            return to_remove(view, self.keep, self.r)
        if (view.layers, view.features.shape[-1]) != (len(learned.r), learned.dim):
            raise ThriftError(
                f"pyra weights {learned} are for {len(learned.r)} layers of {learned.dim} channels, this model has "
                f"{view.layers} of {view.features.shape[-1]}: train weights for it with learn_pyra"
            )
        return learned.r[view.layer]


class PyraLayer(NamedTuple):
    """The weights of one layer: ``a`` ``(r, 1)``, ``b`` ``(dim,)``, and the LayerNorm's, ``(dim,)`` each."""

    a: Tensor
    b: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class PyraWeights:
    """PYRA's weights for a model: one :class:`PyraLayer` a layer, None where ``r`` is 0."""

    r: list[int]
    dim: int
    layers: list[PyraLayer | None]
    model: str = ""
    file: str = "in memory"

    def __repr__(self) -> str:
        return f"{self.file} (of {self.model or 'an unnamed model'})"

    @classmethod
    def fresh(cls, r: list[int], dim: int, model: str = "", seed: int = 0) -> PyraWeights:
        """Untrained: ``a`` uniform in [-1, 1] (Kaiming, slope sqrt 5), ``b`` zero, so that PYRA is ToMe."""
        generator = torch.Generator().manual_seed(seed)

        def layer(n: int) -> PyraLayer:
            a = nn.init.kaiming_uniform_(torch.empty(n, 1), a=5**0.5, generator=generator)
            return PyraLayer(a, torch.zeros(dim), torch.ones(dim), torch.zeros(dim))

        return cls(list(r), dim, [layer(n) if n else None for n in r], model)

    def parameters(self) -> list[Tensor]:
        """All tensors, in the order of the layers."""
        return [t for layer in self.layers if layer is not None for t in layer]

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file; its metadata name the model and what each layer removes."""
        from safetensors.torch import save_file

        layers = {i: layer._asdict() for i, layer in enumerate(self.layers) if layer is not None}
        tensors = {f"layers.{i}.{k}": t.detach().contiguous() for i, layer in layers.items() for k, t in layer.items()}
        about = {"pyra": "1", "model": self.model, "r": json.dumps(self.r), "dim": str(self.dim)}
        save_file(tensors, path, metadata=about)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> PyraWeights:
        """Read what :meth:`save` wrote. Raises ThriftError for anything else."""
        from safetensors import SafetensorError, safe_open

        if not isinstance(path, str | PathLike) or not _is_file(path):
            raise ThriftError(f"pyra weights={path!r} is no file: train them with learn_pyra, or leave weights out")
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            r, dim = json.loads(about["r"]), int(about["dim"])
            layers = [
                PyraLayer(*(tensors.pop(f"layers.{i}.{part}") for part in PyraLayer._fields)) if n else None
                for i, n in enumerate(r)
            ]
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ThriftError(f"'{path}' is no file of pyra weights ({error!r}): write one with learn_pyra") from error
        for n, layer in zip(r, layers, strict=True):
            if layer is not None and [tuple(t.shape) for t in layer] != [(n, 1), (dim,), (dim,), (dim,)]:
                raise ThriftError(f"'{path}' is damaged: its weights do not fit r={r} and {dim} channels")
        return cls(r, dim, layers, about.get("model", ""), str(path))


def _is_file(path: str | PathLike[str]) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name that is too long, or that no file can have
        return False
