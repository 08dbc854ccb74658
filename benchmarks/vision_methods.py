"""Speed and fidelity of every vision method on DINOv2-small, beside the unmodified model, in turns, in one run.

    python benchmarks/vision_methods.py [--sizes 224 518] [--methods tome evit] [--keep 0.75 0.5] [--peer tome/merge.py]

Needs the dinov2-s pack (fetched on first use) and photos: a folder of them, or scikit-image's own. Prints a markdown
table and, with --out FILE, appends every row to a file of JSON lines; plans that are in it are not measured again.
Times are medians over the repeats, of one forward of the batch. "matching" is the share of the time in which tokens
are compared, merged and copied back. Fidelity is the mean over the photos: cosines to the unmodified model of the CLS
token, of the mean patch token and (mean) of each patch token, copied back to all positions; and the correlation of
the pack's saliency map made from them with the map of the unmodified model.

--peer names the file ``tome/merge.py`` of the authors' repository (facebookresearch/ToMe): its matching and merging is
timed beside ours on tensors of the same shapes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cosine_similarity

import tokenthrift as tt
from tokenthrift.models.images import open_image, preprocess
from tokenthrift.models.saliency import load_saliency_head
from tokenthrift.ops.matching import bipartite_soft_matching, leading
from tokenthrift.vision.overlay import draw_groups

Op = Callable[[Tensor, Tensor, Tensor, int, bool], None]

PHOTOS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg")
OTHER = {
    "tome": ["tome(r=(17, -1.0))", "tome(r=16, prop_attn=False)"],
    "evit": ["evit(keep=0.5, fuse=False)"],
    "mctf": ["mctf(keep=0.5, one_step_ahead=False)"],
    "tomesd": ["tomesd(ratio=0.25)", "tomesd(ratio=0.5)", "tomesd(ratio=0.75)", "tomesd(ratio=0.5, mlp=True)"],
    "super_tokens": ["super_tokens(cell=(2, 2))", "super_tokens(cell=(4, 4))"],
    "centerclip": ["centerclip(centers=0.75)", "centerclip(centers=0.5)", "centerclip(centers=0.25)"],
}
"""Plans of methods that have no share to keep, and settings worth a row of their own."""
WIDE = {518: {"tome(r=(17, -1.0))": "tome(r=(85, -1.0))", "tome(r=16, prop_attn=False)": "tome(r=85, prop_attn=False)"}}
"""What stands in for a plan at a size, because its numbers are of tokens."""
ELSEWHERE = ("pitome_text", "subtokens", "fastvggt")
"""Methods for other models than an encoder of images."""


def plans_for(size: int, names: list[str] | None, shares: list[float]) -> list[str]:
    """Every method at every share, then the other settings."""
    plans = []
    for info in tt.methods(stage="vision"):
        if info.name in ELSEWHERE or (names and info.name not in names):
            continue
        if "keep" in info.defaults:
            plans += [f"{info.name}(keep={share})" for share in shares]
        plans += [WIDE.get(size, {}).get(plan, plan) for plan in OTHER.get(info.name, [])]
    return plans


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


class Bench:
    """One model at one size of image."""

    def __init__(self, model: Any, head: Any, images: list[Any], size: int, batch: int) -> None:
        self.model, self.head = model, head
        self.size, self.grid = size, (size // 14, size // 14)
        self.pixels = preprocess(images, size)
        self.batch = self.pixels[torch.arange(batch) % len(self.pixels)]
        self.dense = torch.cat([model(x).last_hidden_state for x in self.pixels.split(1)])
        self.maps = self.saliency(self.dense)

    def saliency(self, features: Tensor) -> Tensor:
        """One score a patch: ``(images, patches)``."""
        return torch.cat([self.head(f, self.grid, self.grid).flatten(1) for f in features.split(1)])

    def fidelity(self, plan: str) -> dict[str, Any]:
        """How near the features stay to those of the unmodified model."""
        features = []
        for x in self.pixels.split(1):
            with tt.apply(f"vision={plan}", self.model) as session:
                out = self.model(x).last_hidden_state
            map = session.provenance()["vision"]
            if isinstance(map, dict):  # merged and unmerged in each layer
                map = list(map.values())[-1]
            features.append(map.unmerge(out) if out.shape[1] == map.n_out < map.n_in else out)
        report = session.report()
        found, dense = torch.cat(features), self.dense
        return {
            "tokens": map.n_out,
            "flops": report.flops / report.flops_dense,
            "cls": float(cosine_similarity(found[:, 0], dense[:, 0], dim=-1).mean()),
            "mean_patch": float(cosine_similarity(found[:, 1:].mean(1), dense[:, 1:].mean(1), dim=-1).mean()),
            "patches": float(cosine_similarity(found[:, 1:], dense[:, 1:], dim=-1).mean()),
            "map": correlation(self.saliency(found), self.maps),
        }

    def seconds(self, plans: list[str], repeats: int) -> dict[str, tuple[list[float], list[float]]]:
        """Of every plan, "" being the unmodified model: wall times in turns, and the shares of it spent matching."""
        times: dict[str, tuple[list[float], list[float]]] = {plan: ([], []) for plan in ["", *plans]}
        for repeat in track(
            range(repeats + 1), f"timing {self.size} px", console=None, disable=not sys.stderr.isatty()
        ):
            for plan, (walls, inside) in times.items():
                with tt.apply(f"vision={plan}" if plan else None, self.model) as session:
                    start = time.perf_counter()
                    self.model(self.batch)
                    wall = time.perf_counter() - start
                if repeat:  # the first round warms up
                    walls.append(wall)
                    inside.append(session.records["vision"].seconds / wall if plan else 0.0)
        return times

    def draw(self, plan: str, image: Any, folder: Path) -> None:
        """A picture of what the plan did to a photo."""
        with tt.apply(f"vision={plan}", self.model) as session:
            self.model(self.pixels[:1])
        name = plan.translate(str.maketrans("(), ", "____"))
        map = session.provenance()["vision"]
        map = list(map.values())[-1] if isinstance(map, dict) else map
        picture = draw_groups(image.resize((1036, 1036)), map, self.grid)
        picture.save(folder / f"{self.size}_{name}.png")


def correlation(a: Tensor, b: Tensor) -> float:
    """Mean over rows of Pearson's correlation."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return float(cosine_similarity(a, b, dim=-1).mean())


def ours(keys: Tensor, x: Tensor, sizes: Tensor, r: int, lift: bool) -> None:
    """Match, merge, count; and copy back if asked."""
    protected = leading(1, *keys.shape[:2])
    groups = bipartite_soft_matching(keys, r, protected)
    assert groups is not None
    map = groups.map(sizes)
    out = map.apply(x)
    map.sizes(sizes)
    if lift:
        map.unmerge(out)


def theirs(official: Any) -> Op:
    """The same with the authors' functions."""

    def run(keys: Tensor, x: Tensor, sizes: Tensor, r: int, lift: bool) -> None:
        merge, unmerge = official.bipartite_soft_matching(keys, r, class_token=True)
        out, _ = official.merge_wavg(merge, x, sizes.unsqueeze(-1))
        if lift:
            unmerge(out)

    return run


def peer(path: Path, repeats: int) -> None:
    """The authors' matching, merging and sizes against ours, on random tensors of DINOv2-small's shapes."""
    spec = importlib.util.spec_from_file_location("tome_merge", path)
    assert spec is not None and spec.loader is not None
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
    print("| batch | tokens | r | ToMe ms | ours ms | ours / ToMe | with unmerge: ToMe ms | ours ms |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    for batch, tokens, r in ((1, 257, 16), (8, 257, 16), (1, 1370, 85), (8, 1370, 85)):
        torch.manual_seed(0)
        keys, x, sizes = torch.randn(batch, tokens, 64), torch.randn(batch, tokens, 384), torch.rand(batch, tokens) + 1
        ran = ((f, lift) for lift in (False, True) for f in (theirs(official), ours))
        runs: dict[tuple[Op, bool], list[float]] = {run: [] for run in ran}
        for _ in range(5 * repeats):
            for (run, lift), found in runs.items():
                start = time.perf_counter()
                for _ in range(4):
                    run(keys, x, sizes, r, lift)
                found.append((time.perf_counter() - start) / 4 * 1000)
        a, b, c, d = (statistics.median(found) for found in runs.values())
        print(f"| {batch} | {tokens} | {r} | {a:.2f} | {b:.2f} | {b / a:.2f} | {c:.2f} | {d:.2f} |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 518], help="image sides in pixels")
    parser.add_argument("--methods", nargs="+", help="instead of all")
    parser.add_argument("--plans", nargs="+", help="vision plans, instead of methods × shares")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5, 0.25], help="shares of the patches")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1, help="images in a timed forward")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--images", type=Path, help="a folder of photos")
    parser.add_argument("--overlay", type=Path, help="a folder for pictures of what was merged in the first photo")
    parser.add_argument("--peer", type=Path, help="tome/merge.py of the authors' repository")
    parser.add_argument("--out", type=Path, help="file of JSON lines to append to and to go on from")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    model, _ = tt.load("dinov2-s")
    head, images = load_saliency_head(), photos(args.images)
    print(
        f"dinov2-s, float32, {args.threads} threads, batch {args.batch}, medians of {args.repeats} interleaved "
        f"repeats, fidelity over {len(images)} photos; torch {torch.__version__}, {platform.machine()}\n"
    )
    if args.peer:
        peer(args.peer, args.repeats)
    columns = ["pixels", "plan", "tokens left", "ms", "images/s", "speed-up", "FLOPs", "matching"]
    columns += ["cosine CLS", "mean patch", "patches", "saliency map r"]
    print(f"| {' | '.join(columns)} |\n|--:|---|{'--:|' * (len(columns) - 2)}")
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out and args.out.exists() else []
    for size in args.sizes:
        known = {row["plan"]: row for row in done if row["pixels"] == size}
        plans = [p for p in args.plans or plans_for(size, args.methods, args.keep) if p not in known]
        for row in known.values():
            print_row(row)
        if not plans:
            continue
        bench = Bench(model, head, images, size, args.batch)
        times = bench.seconds(plans, args.repeats)
        base = statistics.median(times[""][0])
        for plan, (walls, inside) in times.items():
            exact = {
                "tokens": bench.dense.shape[1],
                "flops": 1.0,
                "cls": 1.0,
                "mean_patch": 1.0,
                "patches": 1.0,
                "map": 1.0,
            }
            wall = statistics.median(walls)
            row = {
                "pixels": size,
                "plan": plan,
                "ms": 1000 * wall,
                "images_s": args.batch / wall,
                "speed_up": base / wall,
            }
            row |= {"matching": statistics.median(inside), **(bench.fidelity(plan) if plan else exact)}
            print_row(row)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            if args.overlay and plan:
                args.overlay.mkdir(parents=True, exist_ok=True)
                bench.draw(plan, images[0], args.overlay)


def print_row(row: dict[str, Any]) -> None:
    cells = [row["pixels"], f"`{row['plan'] or 'unmodified'}`", row["tokens"], f"{row['ms']:.0f}"]
    cells += [f"{row['images_s']:.1f}", f"{row['speed_up']:.2f}×", f"{row['flops']:.0%}", f"{row['matching']:.0%}"]
    cells += [f"{row[name]:.4f}" for name in ("cls", "mean_patch", "patches", "map")]
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
