"""Scenes for visual questions: photographs of clothes laid on photographs of other things, all drawn from a seed.

A scene is drawn in two steps. `lay_out` decides by chance what lies where (`Scene`: a few numbers, no pixels) and
`draw` makes the image of it, of any size. The items are Fashion-MNIST's, 28×28 grey pixels each. The items and
backgrounds of `held_out()` come with the package: those of the test split, and photographs that no training saw.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

import numpy as np

from ..core.errors import ThriftError

SIZE = 224
"""Boxes are in pixels of a canvas of this size, whatever the size that is drawn."""

NAMES = ("shirt", "trouser", "coat", "sandal", "sneaker", "bag", "boot")
LABELS: Mapping[int, str] = {
    0: "shirt", 1: "trouser", 2: "coat", 4: "coat", 5: "sandal", 7: "sneaker", 8: "bag", 9: "boot"
}  # fmt: skip
"""Fashion-MNIST's labels by our names. Pullover and coat share one, and dresses (3) and shirts that are no T-shirts (6)
are left out: at 28 pixels people confuse these as well."""

PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
"""The nine places of a canvas, row by row. There is at most one item in each."""

MOST = 5
"""Items in a scene, at most."""

_SIDE, _SHIFT = (56, 84), 14
_TINTS = {
    "white": (1.0, 1.0, 1.0),
    "red": (1.0, 0.5, 0.45),
    "blue": (0.5, 0.75, 1.0),
    "green": (0.55, 1.0, 0.55),
    "yellow": (1.0, 0.9, 0.4),
    "pink": (0.95, 0.6, 1.0),
}
COLOURS = tuple(_TINTS)


@dataclass(frozen=True)
class Item:
    """One item of a scene: what it is, where (left, top, side; in pixels of 224), and how it is painted."""

    name: str
    left: int
    top: int
    side: int
    sprite: int
    colour: int
    flip: bool

    @property
    def middle(self) -> tuple[float, float]:
        """x and y of its centre."""
        return self.left + self.side / 2, self.top + self.side / 2

    @property
    def place(self) -> int:
        """The number of the place in which its centre lies."""
        x, y = self.middle
        return int(3 * y // SIZE) * 3 + int(3 * x // SIZE)


@dataclass(frozen=True)
class Scene:
    """Items that do not overlap, and what is behind them: a square (left, top, side; shares) of a photograph."""

    items: tuple[Item, ...]
    background: int
    crop: tuple[float, float, float]
    light: tuple[float, float, float]
    mirror: bool


@dataclass(frozen=True)
class Collection:
    """What scenes are made of: (n, 28, 28) uint8 items for each of `NAMES`, and RGB photographs as arrays."""

    items: Mapping[str, np.ndarray]
    backgrounds: Sequence[np.ndarray]

    @cached_property
    def counts(self) -> dict[str, int]:
        return {name: len(self.items[name]) for name in NAMES}


def lay_out(rng: random.Random, collection: Collection) -> Scene:
    """One to five items at random places. About half of the scenes show something more than once."""
    number = rng.choices(range(1, MOST + 1), weights=(1, 2, 3, 4, 4))[0]
    while True:
        names = rng.sample(NAMES, rng.choice((1, 2, number, number)) if number > 1 else 1)
        wanted = names if len(names) == number else [rng.choice(names) for _ in range(number)]
        items = tuple(
            _item(rng, name, place, collection)
            for name, place in zip(wanted, rng.sample(range(len(PLACES)), number), strict=True)
        )
        if not any(_overlap(a, b) for i, a in enumerate(items) for b in items[:i]):
            break
    side = rng.uniform(0.4, 1.0)
    light = rng.uniform(0.3, 0.75)
    return Scene(
        items,
        rng.randrange(len(collection.backgrounds)),
        (rng.uniform(0, 1 - side), rng.uniform(0, 1 - side), side),
        tuple(light * rng.uniform(0.8, 1.1) for _ in range(3)),  # type: ignore[arg-type]
        rng.random() < 0.5,
    )


def _item(rng: random.Random, name: str, place: int, collection: Collection) -> Item:
    side = rng.randint(*_SIDE)
    row, column = divmod(place, 3)
    # Centres stay a sixth of a place away from its borders: nobody should argue about what is "top" and "top left".
    left, top = (
        min(max(round(SIZE * (index + 0.5) / 3 - side / 2) + rng.randint(-_SHIFT, _SHIFT), 0), SIZE - side)
        for index in (column, row)
    )
    return Item(
        name, left, top, side, rng.randrange(collection.counts[name]), rng.randrange(len(COLOURS)), rng.random() < 0.5
    )


def _overlap(a: Item, b: Item) -> bool:
    return max(a.left, b.left) < min(a.left + a.side, b.left + b.side) and max(a.top, b.top) < min(
        a.top + a.side, b.top + b.side
    )


def draw(scene: Scene, collection: Collection, size: int = SIZE) -> Any:
    """The scene as a square RGB Pillow image of `size` pixels."""
    from PIL import Image

    photo = collection.backgrounds[scene.background]
    height, width = photo.shape[:2]
    side = int(scene.crop[2] * min(height, width))
    left, top = int(scene.crop[0] * width), int(scene.crop[1] * height)
    left, top = min(left, width - side), min(top, height - side)
    square = Image.fromarray(photo[top : top + side, left : left + side]).resize((size, size), Image.Resampling.BICUBIC)
    canvas = np.asarray(square, dtype=np.float32) * np.asarray(scene.light, dtype=np.float32)
    if scene.mirror:
        canvas = canvas[:, ::-1].copy()
    scale = size / SIZE
    for item in scene.items:
        edge, x, y = (round(value * scale) for value in (item.side, item.left, item.top))
        edge = min(edge, size - x, size - y)
        sprite = collection.items[item.name][item.sprite]
        grey = Image.fromarray(sprite[:, ::-1].copy() if item.flip else sprite)
        value = np.asarray(grey.resize((edge, edge), Image.Resampling.BICUBIC), dtype=np.float32)[..., None]
        opaque = np.clip(value / 80, 0, 1)  # the black around an item is no part of it
        paint = np.clip(value * 0.85 + 38, 0, 255) * np.asarray(_TINTS[COLOURS[item.colour]], dtype=np.float32)
        spot = canvas[y : y + edge, x : x + edge]
        canvas[y : y + edge, x : x + edge] = spot * (1 - opaque) + paint * opaque
    return Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))


@cache
def held_out() -> Collection:
    """The items and photographs that come with the package. Nothing of it was used in training.

    Raises:
        ThriftError: Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ThriftError("drawing scenes needs Pillow: pip install 'tokenthrift[packs]'") from error

    data = files("tokenthrift").joinpath("data")
    with data.joinpath("scenes/items.png").open("rb") as stream, Image.open(stream) as sheet:
        pixels = np.asarray(sheet.convert("L"))
    rows = pixels.reshape(len(NAMES), 28, -1, 28).transpose(0, 2, 1, 3)
    photographs = []
    for name in ("astronaut", "cat", "coffee", "rocket"):
        with data.joinpath(f"images/{name}.jpg").open("rb") as stream, Image.open(stream) as image:
            photographs.append(np.asarray(image.convert("RGB")))
    return Collection(dict(zip(NAMES, rows, strict=True)), tuple(photographs))
