"""Does `tokenthrift tune` find a better schedule than the constant one, at equal FLOPs, on photos it has not seen?

    python benchmarks/vision_tune.py ["vision=tps(r=16)" ...] [--size 224] [--generations 20] [--out FOLDER]

Needs the dinov2-s pack and scikit-image's photos. Half of the photos, in crops, is searched on (tune itself holds out a
quarter of these crops); the crops of the other photos are for the table that is printed: FLOPs, the mean losses (1 −
cosine of CLS and of the patches, half each), and by how much the loss fell, with the 95% interval over photos
(bootstrap, paired). The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import tokenthrift as tt
from tokenthrift.bench.data import load_data
from tokenthrift.bench.fidelity import Fidelity, fidelity_of
from tokenthrift.bench.loading import load_model
from tokenthrift.bench.metrics import bootstrap
from tokenthrift.bench.tuning import TuneResult
from tokenthrift.models.images import open_image

SEARCHED = ("astronaut.png", "coffee.png", "rocket.jpg", "grass.png", "coins.png", "motorcycle_left.png")
HELD_OUT = ("chelsea.png", "hubble_deep_field.jpg", "camera.png", "ihc.png", "retina.jpg", "brick.png", "moon.png",
            "clock_motion.png")  # fmt: skip


def crop(names: tuple[str, ...], folder: Path, side: int = 2) -> Path:
    """Each photo whole, and its ``side × side`` parts."""
    import skimage.data

    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        photo = open_image(Path(skimage.data.__file__).parent / name)
        w, h = photo.width // side, photo.height // side
        boxes = [(0, 0, photo.width, photo.height)]
        boxes += [(x * w, y * h, (x + 1) * w, (y + 1) * h) for y in range(side) for x in range(side)]
        for number, box in enumerate(boxes):
            photo.crop(box).save(folder / f"{Path(name).stem}-{number}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="*", default=["vision=tps(r=16)", "vision=evit(r=16)", "vision=tome(r=20)"])
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--generations", type=int, default=20)
    parser.add_argument("--offspring", type=int, default=12)
    parser.add_argument("--step", type=int, default=4, help="tokens moved at once")
    parser.add_argument("--out", type=Path, default=Path("out/tune"))
    args = parser.parse_args()

    searched, held_out = crop(SEARCHED, args.out / "searched"), crop(HELD_OUT, args.out / "held-out")
    loaded = load_model("dinov2-s", None, args.size)
    photos = [sorted(held_out.glob(f"{Path(name).stem}-*.png")) for name in HELD_OUT]
    fidelities = [fidelity_of(loaded, load_data(crops), "vision", len(crops), seed=0) for crops in photos]
    rows = []
    for plan in args.plans:
        found = tt.tune(
            plan,
            "dinov2-s",
            searched,
            args.out / "".join(c if c.isalnum() else "-" for c in f"{plan}-{args.size}"),
            size=args.size,
            generations=args.generations,
            offspring=args.offspring,
            step=args.step,
        )
        rows.append(row(found, fidelities))
    print(f"\ndinov2-s, {args.size} pixels; held out: {len(photos)} photos in {sum(map(len, photos))} crops\n")
    print(
        "| constant | tuned `r` | FLOPs | loss: constant | tuned | gain (95%) |\n|---|---|--:|--:|--:|--:|",
        *rows,
        sep="\n",
    )


def row(found: TuneResult, fidelities: list[Fidelity]) -> str:
    """A line of the table: start against tuned on the held-out photos, whose crops are alike: their mean counts."""
    photos = [[[f.measure(plan, i) for plan in (found.start, found.tuned)] for i in range(len(f))] for f in fidelities]
    gains = [fmean(a.loss - b.loss for a, b in photo) for photo in photos]
    pairs = [pair for photo in photos for pair in photo]
    start, tuned = (fmean(pair[which].loss for pair in pairs) for which in (0, 1))
    flops = " → ".join(f"{fmean(pair[which].cost / pair[which].dense for pair in pairs):.1%}" for which in (0, 1))
    gain = " ".join(f"{value / start:+.1%}" for value in bootstrap({"photos": gains}))
    mean, low, high = gain.split()
    tuned_r = found.schedules["tuned"]
    return f"| `{found.start}` | {tuned_r} | {flops} | {start:.4f} | {tuned:.4f} | {mean} ({low} to {high}) |"


if __name__ == "__main__":
    main()
