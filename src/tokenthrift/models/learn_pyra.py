"""Training PYRA's weights on unlabelled images: the unmodified model is the teacher, and stays unmodified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..api import apply
from ..core.errors import ThriftError
from ..core.plan import Plan, Step
from ..core.tokenmap import TokenMap
from .adapters import adapter_for

if TYPE_CHECKING:
    from ..vision.pyra import Pyra


def learn_pyra(
    model: Any,
    batches: Sequence[Tensor],
    method: Pyra,
    *,
    steps: int,
    lr: float = 1e-3,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
    out: str | PathLike[str],
) -> Pyra:
    """Train the weights of ``method`` for ``model``, write them to ``out``, and return the method that uses them.

    The loss is one minus the cosine between the features of the last layer and the unmodified model's: the mean of
    that of the prefix (CLS) and of that of the patches, merged ones copied back to their places. AdamW, without
    weight decay. The model's parameters, their gradients and their ``requires_grad`` stay as they are.

    Args:
        batches: pixel values ``(images, 3, height, width)``, all of one height and width; each epoch takes them in
            another order. They need no labels.
        method: says how many tokens each layer is to remove; weights that it has already are not used.
        steps: batches to learn from; ``lr`` is the paper's for these weights.
        seed: of the initial weights and of the order.
        progress: called with (steps done, steps in all, loss) after every step.
        out: the safetensors file to write.

    Raises:
        ThriftError: no images, images of different sizes, fewer than one step, or a model without a vision encoder.
    """
    if steps < 1:
        raise ThriftError(f"learn_pyra needs at least one step, got steps={steps}")
    if not len(batches) or len({batch.shape[1:] for batch in batches}) > 1:
        raise ThriftError("learn_pyra needs batches of images, all of one height and width")
    encoder = getattr(adapter_for(model), "encoder", model)  # on its own it returns the tokens that are left
    training, needed = model.training, [p.requires_grad for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        shape = _probe(encoder, batches[0], method)
        fresh = method.fresh(shape.removed, shape.dim, _name(model), seed)
        weights: Any = fresh.weights
        parameters = [t.requires_grad_() for t in weights.parameters()]
        if not parameters:
            raise ThriftError("there is nothing to learn where no token is merged: write pyra(r=8), say")
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        for step in range(steps):
            order = order or torch.randperm(len(batches), generator=generator).tolist()
            with torch.enable_grad():
                loss = feature_loss(encoder, batches[order.pop()], fresh, shape.prefix)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            if progress is not None:
                progress(step + 1, steps, loss.item())
    finally:
        model.train(training)
        for parameter, need in zip(model.parameters(), needed, strict=True):
            parameter.requires_grad_(need)
    weights.save(out)
    return replace(fresh, weights=str(out))


def feature_loss(encoder: Any, pixels: Tensor, method: Any, prefix: int) -> Tensor:
    """How far the features are from the unmodified model's: 0 at best, see :func:`learn_pyra`."""
    with torch.no_grad():
        dense = encoder(pixels).last_hidden_state
    with apply(Plan(vision=method), encoder) as session:
        features = encoder(pixels).last_hidden_state
    map = session.provenance()["vision"]
    assert isinstance(map, TokenMap)
    cosine = cosine_similarity(map.unmerge(features).float(), dense.float(), dim=-1)
    parts = [part.mean() for part in (cosine[:, :prefix], cosine[:, prefix:]) if part.numel()]
    return 1 - torch.stack(parts).mean()


@dataclass
class _Probe:
    """Runs a method, and notes what each layer had and lost."""

    method: Any
    removed: list[int] = field(default_factory=list)
    prefix: int = 0
    dim: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def reduce(self, view: Any) -> TokenMap | None:
        map: TokenMap | None = self.method.reduce(view)
        self.prefix, self.dim = view.prefix, view.features.shape[-1]
        self.removed.append(0 if map is None else map.n_in - map.n_out)
        return map


@torch.no_grad()
def _probe(encoder: Any, pixels: Tensor, method: Any) -> _Probe:
    probe = _Probe(method)
    with apply(Plan([Step("vision", probe)]), encoder):
        encoder(pixels)
    return probe


def _name(model: Any) -> str:
    return str(getattr(model.config, "name_or_path", "") or type(model).__name__)
