"""Every method for visual tokens at four budgets on thrift-vlm: right answers, time to the first token, KV bytes.

    python benchmarks/multimodal_methods.py --out out/multimodal

Tokens of the connector keep their positions, so that methods differ in what they choose; at one share they are also
measured with gapless positions, as most authors have it. Over 1,000 held-out questions about 185 scenes, all of one
scene asked with every plan before the next scene, so that a busy machine slows all plans alike. Intervals are
bootstrapped over scenes. Selection is what the methods themselves take; the time to the first token includes it and
the vision encoder. What was measured stays in ``--out``, and an interrupted run goes on there.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from tokenthrift.bench.metrics import share_interval
from tokenthrift.bench.runner import bench
from tokenthrift.bench.tasks import SUITES
from tokenthrift.core.plan import Plan

BASELINES = ("random_tokens", "uniform_tokens", "pool_tokens", "center_tokens")
CONNECTOR = (*BASELINES, "divprune", "vtc_cls", "visionzip", "hiprune", "hired", "flashvlm", "aim")
PREFILL = ("fastv",)
STAGED = {0.5: 0.79, 0.25: 0.63, 0.11: 0.48, 0.055: 0.38}
"""What each of pyramiddrop's three stages leaves so that the last layers have about that share of the visual tokens."""
KEEPS = (0.5, 0.25, 0.11, 0.055)
GAPLESS = 0.25
"""At this share methods of the connector are measured with the authors' gapless positions too."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="thrift-vlm")
    parser.add_argument("--scenes", type=int, default=185)
    parser.add_argument("--keeps", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--methods", nargs="+", default=[*CONNECTOR, *PREFILL, "pyramiddrop"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/multimodal"))
    args = parser.parse_args()

    plans = [plan for name in args.methods for keep in args.keeps for plan in plans_of(name, keep)]
    chance = {
        str(Plan.parse(plan)): str(Plan.parse(drawn))
        for name in args.methods
        for keep in args.keeps
        for plan, drawn in zip(plans_of(name, keep), plans_of("random_tokens", keep), strict=False)
    }
    suite = dataclasses.replace(SUITES["full"], scenes=args.scenes)
    result = bench(args.model, plans=plans, suite=suite, out=args.out, seed=args.seed)
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in result.rows:
        if "error" in row:
            print(f"# {row['plan']}: {row['error']}")
        else:
            found[row["plan"]].append(row)
    print_table(args, found, chance)


def plans_of(name: str, keep: float) -> list[str]:
    if name == "pyramiddrop":
        return [f"prefill={name}(keep={STAGED.get(keep, round(keep ** (1 / 3), 3))})"]
    if name in PREFILL:
        return [f"prefill={name}(keep={keep})"]
    grid = ", grid=True" if name == "uniform_tokens" else ""
    kinds = ("original", "gapless") if keep == GAPLESS else ("original",)
    return [f"connector={name}(keep={keep}, positions={positions}{grid})" for positions in kinds]


def print_table(args: argparse.Namespace, found: dict[str, list[dict[str, Any]]], chance: dict[str, str]) -> None:
    """``chance`` says of every plan which one draws as many tokens."""
    plain = found[""]
    asked = sum(len(row["scores"]) for row in plain)
    print(f"\n{args.model}, {asked} questions about {len(plain)} scenes\n")
    print("| plan | right (95%) | more than random tokens (95%) | KV bytes | TTFT ms | vs unmodified | selection ms |")
    print("|---|" + "--:|" * 6)
    times = {row["case"]: row["ttft_s"] for row in plain}
    full = sum(row["kv_bytes"] for row in plain) / len(plain)
    for plan, rows in found.items():
        right, low, high = share([(hits(row), len(row["scores"])) for row in rows])
        more = ""
        if (drawn := chance.get(plan, plan)) != plan and drawn in found:
            theirs = {row["case"]: hits(row) for row in found[drawn]}
            more = "{:+.1%} ({:+.1%} … {:+.1%})".format(
                *share([(hits(row) - theirs[row["case"]], len(row["scores"])) for row in rows])
            )
        size = sum(row["kv_bytes"] for row in rows) / len(rows)
        ratio = median(row["ttft_s"] / times[row["case"]] for row in rows)
        print(
            f"| `{plan or 'unmodified'}` | {right:.1%} ({low:.1%} … {high:.1%}) | {more} | {size / full:.2f}× "
            f"| {1000 * median(row['ttft_s'] for row in rows):.0f} | {ratio:.2f}× "
            f"| {1000 * median(row['compress_s'] for row in rows):.1f} |"
        )


def hits(row: dict[str, Any]) -> float:
    return sum(right for _, right in row["scores"])


def share(scenes: list[tuple[float, int]]) -> tuple[float, float, float]:
    """Of (right answers, questions) a scene the share of right ones, with its interval."""
    right, asked = zip(*scenes, strict=True)
    return (sum(right) / sum(asked), *share_interval(right, asked))


if __name__ == "__main__":
    main()
