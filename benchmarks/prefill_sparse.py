"""Prefill with attention to chosen chunks against dense prefill: time, keys read, and how far the next tokens move.

    python benchmarks/prefill_sparse.py --lengths 2048 4096 8192
    python benchmarks/prefill_sparse.py --plans "dhsa(budget=512)" "dhsa(budget=512, block=128, pattern=a_shape)"

Dense and all plans take turns in one process; medians of `--repeats`. KL is that of the predictions after the
prompt's last 128 tokens. The text is the Python documentation that comes with Python (`pydoc_data.topics`, PSF
licence). `--tiny` takes a random model of two layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import nullcontext
from pydoc_data.topics import topics
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import tokenthrift as tt

PLANS = [
    "dhsa(budget=512)",
    "dhsa(budget=512, block=128)",
    "dhsa(budget=512, block=128, pattern=a_shape)",
    "dhsa(budget=512, block=128, pattern=vertical_slash)",
]


def model_and_text(name: str, length: int) -> tuple[Any, Tensor]:
    if name == "tiny":
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=500, num_hidden_layers=2, **sizes)).eval(), torch.randint(
            3, 500, (1, length)
        )
    model, tokenizer = tt.load(name)
    text = tokenizer("\n".join(topics[topic] for topic in sorted(topics)))["input_ids"]
    return model, torch.tensor([text[:length]])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="pack, folder or hub id")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--plans", nargs="+", default=PLANS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model, text = model_and_text("tiny" if args.tiny else args.model, max(args.lengths))

    rows = []
    for length in args.lengths:
        ids, seconds, last, kept = text[:, :length], {}, {}, {}
        for _ in range(args.repeats):
            for plan in ("", *args.plans):
                with tt.apply(plan, model) if plan else nullcontext() as session:
                    start = perf_counter()
                    logits = model(ids, logits_to_keep=min(128, length)).logits
                    seconds.setdefault(plan, []).append(perf_counter() - start)
                last[plan] = logits[0].float().log_softmax(-1)
                kept[plan] = session.report().stages["prefill"].kept if session else 1.0
        dense = statistics.median(seconds[""])
        for plan in args.plans:
            moved = (last[""].exp() * (last[""] - last[plan])).sum(-1).mean()
            took = statistics.median(seconds[plan])
            rows.append(
                {"length": length, "plan": plan, "read": kept[plan], "kl": float(moved), "seconds": took}
                | {"dense_seconds": dense, "ratio": took / dense}
            )
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print("| tokens | plan | keys read | KL | seconds | of dense |\n|--:|---|--:|--:|--:|--:|")
    for r in rows:
        figures = f"{r['read']:.0%} | {r['kl']:.3f} | {r['seconds']:.2f} | {r['ratio']:.2f}"
        print(f"| {r['length']:,} | `{r['plan']}` | {figures} |")


if __name__ == "__main__":
    main()
