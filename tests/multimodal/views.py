"""Hand-made views of the connector stage: what an adapter would offer, from random numbers."""

from __future__ import annotations

import torch

from tokenthrift.core.view import Lazy, Segment, View

CONNECTOR = ["divprune", "vtc_cls", "visionzip", "hiprune", "hired", "flashvlm", "aim"]
LAYERS = 8


def one_grid(h, w):
    return h * w, (Segment(0, 1, h, w),), []


def crops(h=4, w=6, rows=2, cols=2):
    """A whole image, then crops one by one, with a separator behind each: as in LLaVA-NeXT without its mosaic."""
    segments, separators, start = [Segment(0, 1, h, w)], [], h * w
    for row in range(rows):
        for col in range(cols):
            segments.append(Segment(start, 1, h, w, "crop", row, col))
            separators.append(start + h * w)
            start += h * w + 1
    return start, tuple(segments), separators


def mosaic(h=4, w=3, rows=2, cols=3):
    """A whole image, then the lines of the crops put together, a newline after each: as LLaVA-NeXT lays them out."""
    first, width = h * w, cols * w + 1
    place = first + torch.arange(rows * h)[:, None] * width + torch.arange(width)
    segments = [Segment(0, 1, h, w)]
    for row in range(rows):
        for col in range(cols):
            index = place[row * h : (row + 1) * h, col * w : (col + 1) * w].flatten()
            segments.append(Segment(-1, 1, h, w, "crop", row, col, index))
    return first + rows * h * width, tuple(segments), place[:, -1].tolist()


def frames(t=4, h=3, w=4):
    return t * h * w, tuple(Segment(i * h * w, 1, h, w, "frame") for i in range(t)), []


def video(t=4, h=3, w=4):
    """Frames in one segment, a newline after the last one."""
    return t * h * w + 1, (Segment(0, t, h, w, "frame"),), [t * h * w]


LAYOUTS = {"one grid": one_grid(6, 7), "crops": crops(), "mosaic": mosaic(), "frames": frames(), "video": video()}


def view(layout=LAYOUTS["one grid"], batch=2, seed=0, dim=10, padding=0, layers=LAYERS):
    """Everything that the contract promises; the last ``padding`` tokens of row 0 are none. ``asked`` notes layers."""
    n, segments, separators = layout
    make = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=make)

    parts = {
        "features": random(batch, n, dim),
        "text": random(batch, 5, dim),
        "cls": [(random(batch, 3, n) * 2).softmax(-1) for _ in range(layers)],
        "received": [(random(batch, n) * 2).softmax(-1) for _ in range(layers)],
        "keys": [random(batch, 3, n, 4) for _ in range(layers)],
        "hidden": [random(batch, n, 12) for _ in range(layers)],
    }
    mask, protected = torch.ones(batch, n, dtype=torch.bool), torch.zeros(batch, n, dtype=torch.bool)
    mask[0, n - padding :], protected[:, separators] = False, True
    text_mask = torch.ones(batch, 5, dtype=torch.bool)
    text_mask[0, :2] = False
    made = View(mask=mask, protected=protected, segments=segments, layers=layers, text_mask=text_mask, asked=set())
    for name in ("features", "text"):
        made.offer(name, Lazy(lambda name=name: parts[name]))
    for name in ("cls", "received", "keys", "hidden"):

        def of_layer(layer, name=name):
            made.asked.add(layer % layers)
            return parts[name][layer]

        made.offer(name, of_layer)
    return made


def rows_of(seen, rows):
    """The view of some of the rows."""
    made = View(**{name: getattr(seen, name) for name in ("segments", "layers", "asked")})
    for name in ("features", "text", "text_mask", "mask", "protected"):
        made.offer(name, getattr(seen, name)[rows])
    for name in ("cls", "received", "keys", "hidden"):
        made.offer(name, lambda layer, name=name: getattr(seen, name)(layer)[rows])
    return made
