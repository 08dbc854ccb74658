"""Generate a long text under a fixed cache budget: are bytes flat, the end as fast as the start, positions true?

    python benchmarks/cache_long_generation.py --tokens 2000 --plan "snapkv(budget=512, every=32)"

Prints a table with a row a plan: cache bytes after a quarter and at the end, the most in between, tokens a second in
the first and in the last quarter and their ratio, and by how much the newest entries of the layers miss the position of
the last token. The unreduced cache is the first row. ``--json FILE`` saves these and the bytes after every token,
``--plot FILE`` draws the bytes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import tokenthrift as tt

PLANS = (
    "streaming_llm(budget=512, every=32)",
    "knorm(budget=512, every=32)",
    "snapkv(budget=512, every=32)",
    "h2o(budget=512, every=32)",
    "tova(budget=512, every=32)",
    "tree_kv(budget=512, every=32)",
)


def nbytes(layer: Any) -> int:
    """Memory of a layer's keys and values."""
    return int(getattr(layer, "nbytes", 0) or layer.keys.nbytes + layer.values.nbytes)


@torch.no_grad()
def measure(model: Any, ids: torch.Tensor, plan: str | None, tokens: int) -> dict[str, Any]:
    """One greedy generation, token by token, that never stops early."""
    held, times = [], []
    with tt.apply(plan, model):
        out = model(ids, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        for _ in range(tokens):
            start = time.perf_counter()
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - start)
            held.append(sum(map(nbytes, cache.layers)))
    last = ids.shape[1] + tokens - 1
    quarter = max(tokens // 4, 1)
    first_rate, last_rate = quarter / sum(times[:quarter]), quarter / sum(times[-quarter:])
    drift = [
        int((layer.positions[..., -1] - last).abs().max()) for layer in cache.layers if hasattr(layer, "positions")
    ]
    return {
        "plan": plan or "full cache",
        "bytes": held,
        "first_quarter": first_rate,
        "last_quarter": last_rate,
        "ratio": last_rate / first_rate,
        "drift": max(drift, default=0) + abs(int(cache.get_seq_length()) - last - 1),
    }


def row(result: dict[str, Any]) -> str:
    """A line of the table."""
    held = result["bytes"]
    sizes = " | ".join(f"{n / 1e6:.1f}" for n in (held[len(held) // 4], held[-1], max(held)))
    rates = f"{result['first_quarter']:.1f} | {result['last_quarter']:.1f} | {result['ratio']:.2f}"
    return f"| `{result['plan']}` | {sizes} | {rates} | {result['drift']} |"


def plot(results: list[dict[str, Any]], file: str) -> None:
    """Cache bytes after every token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens generated", ylabel="keys and values, MB")
    for result in results:
        axes.plot([n / 1e6 for n in result["bytes"]], label=result["plan"], linewidth=1)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--plan", action="append", help="may be given several times")
    parser.add_argument("--no-full", action="store_true", help="leave out the unreduced cache")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE", help="an SVG or PNG file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer = tt.load(args.model)
    text = " ".join(f"Item {i} of the list costs {i * 37 % 101} coins." for i in range(args.prompt_tokens))
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : args.prompt_tokens]
    print("| plan | MB after 1/4 | MB at the end | most MB | tokens/s first 1/4 | last 1/4 | ratio | drift |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    results = []
    for plan in [*([] if args.no_full else [None]), *(args.plan or PLANS)]:
        results.append(measure(model, ids, plan, args.tokens))
        print(row(results[-1]), flush=True)
    if args.plot:
        plot(results, args.plot)
    if args.json:
        Path(args.json).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
