"""Views made by hand, for methods."""

import torch

from tokenthrift import View
from tokenthrift.core.view import Lazy


def view(features, prefix=1, layer=0, layers=1, attention=None, held=(), start=None, **more):
    """Of ``features`` ``(batch, tokens, dim)``, with random keys and attention; ``held`` are
    protected positions, ``start`` is the number of tokens at the start."""
    batch, tokens, _ = features.shape
    generator = torch.Generator().manual_seed(7)
    if attention is None:
        attention = torch.randn(batch, 3, tokens, tokens, generator=generator).softmax(-1)
    protected = torch.zeros(batch, tokens, dtype=torch.bool)
    protected[:, [*range(prefix), *held]] = True
    parts = {
        "keys": torch.randn(batch, 3, tokens, 4, generator=generator),
        "sizes": torch.ones(batch, tokens),
        "grid": (1, 1, tokens - prefix),
        "tokens": start or tokens,
        "protected": protected,
        "attention": lambda rows: attention[:, :, rows],
    }
    return View(features=features, prefix=prefix, layer=layer, layers=layers, **(parts | more))


def idle_view(tokens=17, layer=0, layers=12, prefix=1):
    """Of a layer in which a method must compute nothing."""

    def forbidden():
        raise AssertionError("a layer without reduction must compute nothing")

    lazy = {name: Lazy(forbidden) for name in ("keys", "sizes", "protected", "attention")}
    return view(torch.zeros(2, tokens, 8), prefix, layer, layers, **lazy)
