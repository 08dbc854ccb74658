"""Throughput and fidelity of ToMe on DINOv2-small: the unmodified model and several settings, in turns, in one run.

    python benchmarks/vision_tome.py [--sizes 224 518] [--threads 1] [--images FOLDER] [--overlay FOLDER]

Needs the dinov2-s pack (fetched on first use) and photos: a folder of them, or scikit-image's own. Prints a markdown
table. Times are medians over the repeats, of one forward of the batch: wall time, and CPU time, which a busy machine
disturbs less (meaningful with --threads 1). "merging" is the share of the wall time spent on matching, merging and
copying back. Fidelity is the mean over the images of the cosine to the unmodified model, of the CLS token and, copied
back to all positions, of the patch tokens.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

import tokenthrift as tt
from tokenthrift.models.images import open_image, preprocess
from tokenthrift.vision.overlay import draw_groups

PLANS = {
    224: ["tome(r=4)", "tome(r=8)", "tome(r=12)", "tome(r=16)", "tome(r=16, prop_attn=False)"],
    518: ["tome(keep=0.75)", "tome(keep=0.5)", "tome(keep=0.25)", "tome(r=(85, -1.0))", "tome(r=85, prop_attn=False)"],
}
PHOTOS = ["astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg"]


def photos(folder: Path | None) -> list[Any]:
    """Images of the folder, else scikit-image's photos."""
    if folder is None:
        import skimage.data

        paths = [Path(skimage.data.__file__).parent / name for name in PHOTOS]
    else:
        paths = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")]
    found = [open_image(p) for p in paths if p.exists()]
    if not found:
        sys.exit("no photos found: pass --images FOLDER, or pip install scikit-image")
    return found


@torch.no_grad()
def measure(
    model: Any, images: list[Any], size: int, plans: list[str], repeats: int, batch: int
) -> list[dict[str, Any]]:
    """One row per plan, the empty one first."""
    pixels = preprocess(images, size)
    dense = model(pixels).last_hidden_state
    rows = []
    for plan in ["", *plans]:
        with tt.apply(plan, model) as session:
            out = model(pixels).last_hidden_state
        maps = session.provenance()
        report = session.report()
        lifted = maps["vision"].unmerge(out) if maps else out
        rows.append(
            {
                "plan": plan or "unmodified",
                "tokens": out.shape[1],
                "cls": cosine_similarity(out[:, 0], dense[:, 0], dim=-1).mean().item(),
                "patches": cosine_similarity(lifted[:, 1:], dense[:, 1:], dim=-1).mean().item(),
                "flops": report.flops / report.flops_dense if maps else 1.0,
                "map": maps.get("vision"),
                "times": [],
                "cpu": [],
                "inside": [],
            }
        )
    x = pixels[torch.arange(batch) % len(pixels)]
    for repeat in range(repeats + 1):
        for row, plan in zip(rows, ["", *plans], strict=True):
            with tt.apply(plan, model) as session:
                start, busy = time.perf_counter(), time.process_time()
                model(x)
                seconds, busy = time.perf_counter() - start, time.process_time() - busy
            if repeat:  # the first round warms up
                row["times"].append(seconds)
                row["cpu"].append(busy)
                row["inside"].append(session.records["vision"].seconds / seconds if plan else 0.0)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 518], help="image sides in pixels")
    parser.add_argument("--plans", nargs="+", help="vision plans, instead of a few settings for each size")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1, help="images in a timed forward")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--images", type=Path, help="a folder of photos")
    parser.add_argument("--overlay", type=Path, help="a folder for pictures of the merged groups of the first photo")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    model, _ = tt.load("dinov2-s")
    images = photos(args.images)
    print(
        f"dinov2-s, float32, {args.threads} threads, batch {args.batch}, medians of {args.repeats} interleaved "
        f"repeats, fidelity over {len(images)} photos; torch {torch.__version__}, {platform.machine()}\n"
    )
    columns = [
        "pixels",
        "plan",
        "tokens left",
        "ms",
        "images/s",
        "speed-up",
        "CPU ms",
        "CPU speed-up",
        "FLOPs",
        "merging",
    ]
    columns += ["cosine CLS", "cosine patches"]
    print(f"| {' | '.join(columns)} |\n|--:|---|{'--:|' * (len(columns) - 2)}")
    for size in args.sizes:
        plans = args.plans or PLANS[min(PLANS, key=lambda known: abs(known - size))]
        rows = measure(model, images, size, plans, args.repeats, args.batch)
        base, base_cpu = statistics.median(rows[0]["times"]), statistics.median(rows[0]["cpu"])
        for row in rows:
            seconds, cpu = statistics.median(row["times"]), statistics.median(row["cpu"])
            cells = [size, f"`{row['plan']}`", row["tokens"], f"{1000 * seconds:.0f}", f"{args.batch / seconds:.1f}"]
            cells += [f"{base / seconds:.2f}", f"{1000 * cpu:.0f}", f"{base_cpu / cpu:.2f}", f"{row['flops']:.0%}"]
            cells += [f"{statistics.median(row['inside']):.1%}", f"{row['cls']:.4f}", f"{row['patches']:.4f}"]
            print(f"| {' | '.join(map(str, cells))} |")
            if args.overlay and row["map"] is not None:
                args.overlay.mkdir(parents=True, exist_ok=True)
                grid = (size // 14, size // 14)
                picture = draw_groups(images[0].resize((1036, 1036)), row["map"], grid)
                picture.save(args.overlay / f"{size}_{row['plan'].translate(str.maketrans('(), ', '____'))}.png")


if __name__ == "__main__":
    main()
