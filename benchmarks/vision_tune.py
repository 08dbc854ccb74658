"""Does `tokenthrift tune` find a better schedule than the constant one, at equal FLOPs, on photos it has not seen?

    python benchmarks/vision_tune.py [--plan "vision=tome(r=16)"] [--size 224] [--generations 20] [--out FOLDER]

Needs the dinov2-s pack and scikit-image's photos. Half of the photos, in crops, is searched on (tune itself holds out a
quarter of these crops); the crops of the other photos are for the figures that are printed: the mean losses (1 − cosine
of CLS and of the patches, half each), and of the difference the 95% interval over photos (bootstrap, paired). The same
command goes on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import tokenthrift as tt
from tokenthrift.bench.data import load_data
from tokenthrift.bench.fidelity import fidelity_of
from tokenthrift.bench.loading import load_model
from tokenthrift.bench.metrics import bootstrap
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
    parser.add_argument("--plan", default="vision=tome(r=16)")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--generations", type=int, default=20)
    parser.add_argument("--offspring", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("out/tune"))
    args = parser.parse_args()

    searched, held_out = crop(SEARCHED, args.out / "searched"), crop(HELD_OUT, args.out / "held-out")
    found = tt.tune(
        args.plan,
        "dinov2-s",
        searched,
        args.out / "search",
        size=args.size,
        generations=args.generations,
        offspring=args.offspring,
    )
    loaded, rows = load_model("dinov2-s", None, args.size), []
    for name in HELD_OUT:  # crops of one photo are alike: the mean of each photo counts as one
        crops = sorted(held_out.glob(f"{Path(name).stem}-*.png"))
        fidelity = fidelity_of(loaded, load_data(crops), "vision", len(crops), seed=0)
        rows.append([[fidelity.measure(p, i) for i in range(len(crops))] for p in (found.start, found.tuned)])
    start, tuned = ([m for photo in rows for m in photo[which]] for which in (0, 1))
    gain, low, high = bootstrap({"photos": [fmean(m.loss for m in a) - fmean(m.loss for m in b) for a, b in rows]})
    print(f"\nheld out: {len(rows)} photos, {len(start)} crops of {args.size} pixels")
    for label, plan, measured in (("constant", found.start, start), ("tuned", found.tuned, tuned)):
        share = fmean(m.cost / m.dense for m in measured)
        print(f"{label:9} loss {fmean(m.loss for m in measured):.5f}   FLOPs {share:.2%}   {plan}")
    base = fmean(m.loss for m in start)
    print(f"gain {gain:.5f} (95%: {low:.5f} to {high:.5f}), {gain / base:.1%} ({low / base:.1%} to {high / base:.1%})")


if __name__ == "__main__":
    main()
