"""Prefill of prompts of many lengths: packed, padded, and padded after sorting by length; logits compared.

    python benchmarks/prefill_packing.py --lengths 64 128 256 512 1024 2048
    python benchmarks/prefill_packing.py --rows 256 1024 4096    # tokens of a packed row

The three take turns in one process; medians of `--repeats`, printed as ratios to padding. The text is the Python
documentation that comes with Python (`pydoc_data.topics`, PSF licence). `--tiny` takes a random model of two layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pydoc_data.topics import topics
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import tokenthrift as tt


def tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50000, num_hidden_layers=2, **sizes)).eval()


def prompts_of(lengths: list[int], model: str) -> tuple[Any, list[list[int]]]:
    """A model, and pieces of text of these lengths in tokens."""
    if model == "tiny":
        return tiny_model(), [torch.randint(3, 50000, (n,)).tolist() for n in lengths]
    loaded, tokenizer = tt.load(model)
    text = tokenizer("\n".join(topics[name] for name in sorted(topics)))["input_ids"]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return loaded, [text[start : start + n] for start, n in zip(starts, lengths, strict=True)]


def padded(model: Any, prompts: list[list[int]]) -> Tensor:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1]


def in_two(model: Any, prompts: list[list[int]]) -> Tensor:
    """What one does by hand: shorter and longer prompts in a padded batch each."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    half = len(order) // 2 or 1
    logits: dict[int, Tensor] = {}
    for part in (order[:half], order[half:]):
        if part:
            logits.update(zip(part, padded(model, [prompts[i] for i in part]), strict=True))
    return torch.stack([logits[i] for i in range(len(prompts))])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="pack, folder or hub id")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--rows", type=int, nargs="+", default=[2048], help="tokens of a packed row")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model, prompts = prompts_of(args.lengths, "tiny" if args.tiny else args.model)

    ways: dict[str, Any] = {
        "padded": lambda: padded(model, prompts),
        "padded in two batches": lambda: in_two(model, prompts),
    }
    for row in args.rows:
        ways[f"packed, row={row}"] = lambda row=row: tt.pack(model, prompts, row=row).logits[:, 0]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    logits = {}
    for repeat in range(args.repeats + 1):
        for name, run in ways.items():
            start = perf_counter()
            logits[name] = run()
            if repeat:  # the first round warms up
                seconds[name].append(perf_counter() - start)
    base = statistics.median(seconds["padded"])
    rows = [
        {
            "way": name,
            "seconds": statistics.median(times),
            "times faster": base / statistics.median(times),
            "largest difference of logits": float((logits[name] - logits["padded"]).abs().max()),
            "same next token": bool((logits[name].argmax(-1) == logits["padded"].argmax(-1)).all()),
        }
        for name, times in seconds.items()
    ]
    if args.json:
        print(json.dumps({"lengths": args.lengths, "threads": torch.get_num_threads(), "rows": rows}))
        return
    total, width = sum(args.lengths), max(args.lengths)
    print(f"lengths {args.lengths}: {total:,} tokens, {len(prompts) * width:,} with padding")
    print(f"{torch.get_num_threads()} threads\n")
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


if __name__ == "__main__":
    main()
