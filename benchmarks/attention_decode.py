"""Selective attention while decoding: ms/token against the unmodified model and against dense attention without copies.

    python benchmarks/attention_decode.py --tokens 4096 8192 --budgets 256 512 1024

All runs of a length share one prompt cache, of which each gets a copy, and take turns step by step, so that a busy
machine slows all of them alike. "Dense, in place" is this library's cache that appends in place with every entry read:
what of the gain is due to not copying the cache, and what to reading less, is the difference between the rows. The
share read and the fidelity (KL divergence and agreement of the next token, on the text's own continuation) say what it
costs. The text is the Python documentation that comes with Python (`pydoc_data.topics`, PSF licence).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import transformers

METHODS = ("quest", "tidal_decode", "token_select", "fasa")


def main() -> None:
    import tokenthrift as tt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="names, or calls with {b} for the budget")
    parser.add_argument(
        "--steps", type=int, default=32, help="tokens decoded at the end of the context; the first two are not timed"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--cpu", action="store_true", help="CPU seconds, which a busy machine disturbs less; one thread"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    if args.cpu:
        torch.set_num_threads(1)
    model, tokenizer = tt.load(args.model, device=args.device)
    calls = [m if "(" in m else f"{m}(budget={{b}})" for m in args.methods]
    everything: list[dict[str, Any]] = []
    for tokens in args.tokens:
        ids = long_text(tokenizer, tokens).to(args.device)
        plans: dict[str, str | None] = {"unmodified": None, "dense, in place": f"quest(budget={10 * tokens})"}
        plans |= {c.format(b=b): c.format(b=b) for c in calls for b in args.budgets if b < tokens}
        rows = compare(model, ids, tokens - args.steps, plans, process_time if args.cpu else perf_counter)
        everything += rows
        print_table(args, tokens, rows)
    if args.json:
        args.json.write_text(json.dumps(everything, indent=1), encoding="utf-8")


def compare(
    model: Any, ids: torch.Tensor, tokens: int, plans: dict[str, str | None], clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """Decode the same continuation with every plan, in turns."""
    import tokenthrift as tt

    with torch.no_grad():
        prompt = model(ids[:, :tokens], use_cache=True, logits_to_keep=1).past_key_values
    caches = {name: deepcopy(prompt) for name in plans}
    sessions = {name: tt.apply(plan, model) for name, plan in plans.items()}
    times: dict[str, list[float]] = {name: [] for name in plans}
    kl: dict[str, list[float]] = {name: [] for name in plans}
    same: dict[str, list[float]] = {name: [] for name in plans}
    for step in range(tokens, ids.shape[1]):
        want = None
        for name, session in sessions.items():
            with session, torch.no_grad():
                start = clock()
                logits = model(ids[:, step : step + 1], past_key_values=caches[name]).logits[0, -1]
                sync(ids.device)
                times[name].append(clock() - start)
            row = logits.float().log_softmax(-1)
            want = row if want is None else want
            kl[name].append(float((want.exp() * (want - row)).sum()))
            same[name].append(float(row.argmax() == want.argmax()))
    out = []
    for name, session in sessions.items():
        record = session.report().stages.get("attention")
        out.append({
            "tokens": tokens, "plan": name, "ms": 1000 * statistics.median(times[name][2:]),
            "read": record.kept if record else 1.0,
            "kl": statistics.mean(kl[name]), "top1": statistics.mean(same[name]),
        })  # fmt: skip
    return out


def print_table(args: argparse.Namespace, tokens: int, rows: list[dict[str, Any]]) -> None:
    full, dense = rows[0]["ms"], rows[1]["ms"]
    print(
        f"\n{args.model}, {tokens} tokens of context, {args.steps} decoded, {args.device}, "
        f"{torch.get_num_threads()} threads, transformers {transformers.__version__}\n"
    )
    print("| plan | entries read | decode ms/token | vs unmodified | vs dense in place | KL | top-1 |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for r in rows:
        print(
            f"| `{r['plan']}` | {r['read']:.1%} | {r['ms']:.1f} | {r['ms'] / full:.2f}× | {r['ms'] / dense:.2f}× "
            f"| {r['kl']:.4f} | {r['top1']:.0%} |"
        )


def long_text(tokenizer: Any, tokens: int) -> torch.Tensor:
    """``(1, tokens)`` ids of real text: the longest topics of the Python documentation."""
    from pydoc_data.topics import topics

    text = "\n\n".join(sorted(topics.values(), key=len, reverse=True)[:16])
    return tokenizer(text, return_tensors="pt").input_ids[:, :tokens]


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
