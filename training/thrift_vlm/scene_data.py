"""What the scenes for training are made of, and the sheet of held-out items that comes with the package.

    python training/thrift_vlm/scene_data.py --items FOLDER      writes src/tokenthrift/data/scenes/items.png

FOLDER holds Fashion-MNIST's four files (`train-images-idx3-ubyte.gz`, …); Debian's package `dataset-fashion-mnist`
puts them into /usr/share/datasets/fashion-mnist. The backgrounds are sample images that come with scikit-image.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

from tokenthrift.bench.scenes import LABELS, NAMES, Collection

ITEMS = Path("/usr/share/datasets/fashion-mnist")
SHEET = Path(__file__).parents[2] / "src/tokenthrift/data/scenes/items.png"
EACH = 48
"""Held-out items of every name."""
VALIDATION = 5_000
"""So many items at the end of the training split are never trained on: the log's accuracy is measured on them."""

# Not among them: astronaut, cat (chelsea), coffee and rocket, which the held-out scenes lie on.
BACKGROUNDS = (
    "brick.png", "camera.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
    "motorcycle_left.png", "motorcycle_right.png", "page.png", "retina.jpg", "text.png", "clock_motion.png",
    "cell.png",
)  # fmt: skip


def read(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) and labels of the split "train" or "t10k"."""
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as stream:
        images = np.frombuffer(stream.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as stream:
        labels = np.frombuffer(stream.read(), np.uint8, offset=8)
    return images, labels


def by_name(images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The images of every name; where a name has several labels they alternate, so that both are in any part."""
    found = {}
    for name in NAMES:
        parts = [images[labels == label] for label, known in LABELS.items() if known == name]
        shortest = min(map(len, parts))
        found[name] = np.stack([part[:shortest] for part in parts], axis=1).reshape(-1, 28, 28)
    return found


def backgrounds() -> tuple[np.ndarray, ...]:
    """The photographs that are trained on."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    found = []
    for name in BACKGROUNDS:
        with Image.open(folder / name) as image:
            found.append(np.asarray(image.convert("RGB")))
    return tuple(found)


def collections(folder: Path = ITEMS) -> tuple[Collection, Collection]:
    """For training and for the log's accuracy: the same backgrounds, different items."""
    images, labels = read(folder, "train")
    behind = backgrounds()
    fit, check = images[:-VALIDATION], images[-VALIDATION:]
    return (
        Collection(by_name(fit, labels[:-VALIDATION]), behind),
        Collection(by_name(check, labels[-VALIDATION:]), behind),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=Path, default=ITEMS, help="folder with Fashion-MNIST's files")
    items = by_name(*read(parser.parse_args().items, "t10k"))
    sheet = np.stack([items[name][:EACH] for name in NAMES]).transpose(0, 2, 1, 3).reshape(len(NAMES) * 28, EACH * 28)
    SHEET.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(sheet)).save(SHEET, optimize=True)
    print(f"{SHEET}: {SHEET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
