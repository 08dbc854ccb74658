"""Speed and fidelity of token merging in a text encoder, the minilm-l6 pack, on long texts, in turns, in one run.

    python benchmarks/text_encoders.py [--lengths 256 512] [--threads 1] [--batch 8] [--plans "tome(keep=0.5)"]

Needs the minilm-l6 pack (fetched on first use). The texts are the topics of Python's own help (`pydoc_data`) that fill
the length; they are cut there, so nothing is padding. Prints a markdown table. Times are medians over the repeats, of
one forward of a batch: wall time, and CPU time, which a busy machine disturbs less (meaningful with --threads 1).
"reducing" is the share of the wall time spent on matching, merging and copying back.

Fidelity is that of sentence embeddings (the mean over all tokens, merged ones counted as often as they have tokens) to
the unmodified model's: the cosine, on average and of the worst text, and for how many texts the nearest other text is
still the same.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import tokenthrift as tt

PLANS = [
    "tome(keep=0.75)",
    "tome(keep=0.5)",
    "tome(keep=0.25)",
    "tome(keep=0.5, prop_attn=False)",
    "pitome_text(keep=0.75)",
    "pitome_text(keep=0.5)",
    "subtokens()",
]


@torch.no_grad()
def embed(model: Any, tokenizer: Any, ids: Tensor, plan: str) -> tuple[Tensor, Any]:
    """Sentence embeddings of token ids without padding, and the session."""
    with tt.apply(plan, model, processor=tokenizer) as session:
        hidden = model(input_ids=ids).last_hidden_state
    map = session.provenance().get("vision")
    if map is not None and hidden.shape[1] == map.n_out:
        hidden = map.unmerge(hidden)
    return normalize(hidden.mean(1), dim=-1), session


def fidelity(model: Any, tokenizer: Any, ids: Tensor, plans: list[str], batch: int) -> list[dict[str, Any]]:
    """A row for each plan, the empty one first."""
    rows: list[dict[str, Any]] = []
    for plan in plans:
        parts = [embed(model, tokenizer, part, plan) for part in ids.split(batch)]
        found = torch.cat([embedding for embedding, _ in parts])
        reports = [session.report() for _, session in parts]
        kept = [report.stages["vision"].kept for report in reports if plan]
        rows.append(
            {
                "plan": plan or "unmodified",
                "embeddings": found,
                "kept": statistics.mean(kept) if kept else 1.0,
                "flops": sum(r.flops for r in reports) / sum(r.flops_dense for r in reports) if plan else 1.0,
                "times": [],
                "cpu": [],
                "inside": [],
            }
        )
    dense = rows[0]["embeddings"]
    for row in rows:
        cosine = (row["embeddings"] * dense).sum(-1)
        row["cosine"], row["worst"] = cosine.mean().item(), cosine.min().item()
        row["same"] = (nearest(row["embeddings"]) == nearest(dense)).float().mean().item()
    return rows


def nearest(embeddings: Tensor) -> Tensor:
    """The other text that is most alike, for every text."""
    return (embeddings @ embeddings.T).fill_diagonal_(-2).argmax(-1)


@torch.no_grad()
def add_times(model: Any, tokenizer: Any, ids: Tensor, rows: list[dict[str, Any]], plans: list[str], repeats: int):
    """Time all plans in turns; the first round warms up."""
    for repeat in range(repeats + 1):
        for row, plan in zip(rows, plans, strict=True):
            with tt.apply(plan, model, processor=tokenizer) as session:
                start, busy = time.perf_counter(), time.process_time()
                model(input_ids=ids)
                seconds, busy = time.perf_counter() - start, time.process_time() - busy
            if repeat:
                row["times"].append(seconds)
                row["cpu"].append(busy)
                row["inside"].append(session.records["vision"].seconds / seconds if plan else 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512], help="tokens in a text, special ones too")
    parser.add_argument("--plans", nargs="+", default=PLANS, help="vision plans (the stage of merging in encoders)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8, help="texts in a timed forward")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    model, tokenizer = tt.load("minilm-l6")
    plans = ["", *args.plans]
    print(
        f"minilm-l6, float32, {args.threads} threads, batch {args.batch}, medians of {args.repeats} interleaved "
        f"repeats; torch {torch.__version__}, {platform.machine()}\n"
    )
    columns = ["tokens", "texts", "plan", "tokens left", "ms", "speed-up", "CPU ms", "CPU speed-up", "FLOPs"]
    columns += ["reducing", "cosine", "worst", "same nearest"]
    print(f"| {' | '.join(columns)} |\n|--:|--:|---|{'--:|' * (len(columns) - 3)}")
    for length in args.lengths:
        encoded = tokenizer(list(topics.values()), truncation=True, max_length=length, verbose=False)["input_ids"]
        ids = torch.tensor([row for row in encoded if len(row) == length])
        if len(ids) < 2:
            sys.exit(f"no texts of {length} tokens: write --lengths 256 512")
        rows = fidelity(model, tokenizer, ids, plans, args.batch)
        add_times(model, tokenizer, ids[torch.arange(args.batch) % len(ids)], rows, plans, args.repeats)
        base, base_cpu = statistics.median(rows[0]["times"]), statistics.median(rows[0]["cpu"])
        for row in rows:
            seconds, cpu = statistics.median(row["times"]), statistics.median(row["cpu"])
            cells = [length, len(ids), f"`{row['plan']}`", f"{row['kept']:.0%}", f"{1000 * seconds:.0f}"]
            cells += [f"{base / seconds:.2f}", f"{1000 * cpu:.0f}", f"{base_cpu / cpu:.2f}", f"{row['flops']:.0%}"]
            cells += [f"{statistics.median(row['inside']):.1%}", f"{row['cosine']:.4f}", f"{row['worst']:.4f}"]
            cells += [f"{row['same']:.0%}"]
            print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
